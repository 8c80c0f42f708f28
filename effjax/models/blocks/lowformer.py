"""LowFormer's block: attention, perceptron and a mobile convolution, each with its residual connection.

    x <- x + drop(lowtention(norm(x)))
    x <- x + drop(ffn(norm(x)))
    x <- x + drop(mbconv(x))

The norm is over all channels and places of an example. Source: Nottebaum et al. 2025, section 4 and figure 4.
"""

import dataclasses

import flax.linen as nn
from jaxtyping import Array, Float

from effjax.ffn.mlp import MLP
from effjax.layers.drop import stochastic_depth
from effjax.layers.norms import norm
from effjax.mixers.context import Context
from effjax.mixers.lowtention import Lowtention
from effjax.models.blocks.mbconv import MBConv


class LowFormer(nn.Module):
    """Attention, perceptron, convolution.

    Attributes:
      local: the mobile convolution.
      mixer: the attention; None leaves it out, as the edge variants of 2026 do.
      ffn: the perceptron; None leaves it out together with the norm of the attention.
      epsilon: of the norms.
    """

    mixer: Lowtention | None = None
    ffn: MLP | None = None
    local: MBConv = dataclasses.field(default_factory=MBConv)
    epsilon: float = 1e-5

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        drop_rate: Float[Array, ""],
        context: Context,
        train: bool = False,
    ) -> tuple[Float[Array, "b h w c"], None]:
        """Returns `(x, None)`; `drop_rate` is this layer's stochastic depth, of every branch."""
        if self.mixer is not None:
            h = x if self.ffn is None else norm("group", self.epsilon, "mixer_norm")(x)  # [B, H, W, C]
            h = self.mixer(h, context, train=train)  # [B, H, W, C]
            x = x + stochastic_depth(self, h, drop_rate, train)
        if self.ffn is not None:
            h = self.ffn(norm("group", self.epsilon, "ffn_norm")(x), train=train)  # [B, H, W, C]
            x = x + stochastic_depth(self, h, drop_rate, train)
        return self.local(x, drop_rate, context, train=train)
