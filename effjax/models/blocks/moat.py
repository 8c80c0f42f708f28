"""MOAT: an inverted residual and self-attention by turns, with no perceptron.

    x <- shortcut(x) + drop(mbconv(x))
    x <- x + drop(attention(norm(x)))

Next to a transformer's block, the perceptron is a mobile convolution and stands before the attention, so that
it makes the map coarser as well. Since it mixes neighbours, attention in windows needs no shift.

Source: Yang et al. 2023, "MOAT: Alternating Mobile Convolution and Attention Brings Strong Vision Models",
equations 6 to 9 and figure 1.
"""

import dataclasses

import flax.linen as nn
from jaxtyping import Array, Float

from effjax import mixers
from effjax.config import part
from effjax.layers.axes import constrain
from effjax.layers.drop import stochastic_depth
from effjax.layers.norms import norm
from effjax.mixers.context import Context
from effjax.models.blocks.mbconv import MBConv


class MOAT(nn.Module):
    """Mobile convolution, then attention.

    Attributes:
      mixer: the attention, on a grid.
      conv: the mobile convolution.
      epsilon: of the layer norm before the attention.
    """

    mixer: nn.Module = part(mixers.KINDS)
    conv: MBConv = dataclasses.field(default_factory=MBConv)
    epsilon: float = 1e-5

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        drop_rate: Float[Array, ""],
        context: Context,
        train: bool = False,
    ) -> tuple[Float[Array, "b h2 w2 o"], None]:
        """Returns `(x, None)`; `drop_rate` is this layer's stochastic depth, of both branches."""
        x, _ = self.conv(x, drop_rate, context, train=train)  # [B, H/s, W/s, O]
        h = norm("layer", self.epsilon, "mixer_norm")(x)
        h = self.mixer(h, context, train=train)  # [B, H/s, W/s, O]
        return constrain(x + stochastic_depth(self, h, drop_rate, train)), None
