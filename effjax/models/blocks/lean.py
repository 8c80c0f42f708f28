"""The block of fast convolutional networks, whose norms stand inside its parts.

    x <- gate([x +] drop(mixer(x)))
    x <- x + drop(ffn(x))

A re-parameterised mixer holds the identity itself and gets no other.

Source: LSNet, Wang et al. 2025, section 3.3 and figure 5; before it LeViT, Graham et al. 2021, and RepViT,
Wang et al. 2024.
"""

import flax.linen as nn
from jaxtyping import Array, Float

from effjax import ffn, mixers
from effjax.config import part
from effjax.layers.axes import constrain
from effjax.layers.drop import drop_path
from effjax.layers.squeeze_excite import SqueezeExcite
from effjax.mixers.context import Context


class Lean(nn.Module):
    """One mixer and one FFN without norms of the block's own.

    Attributes:
      mixer: how places mix.
      ffn: how channels mix.
      residual: whether the map is added to what the mixer makes of it.
      squeeze: channels inside squeeze and excite behind the mixer, as a share of all; None leaves it out.
    """

    mixer: nn.Module = part(mixers.KINDS)
    ffn: nn.Module = part(ffn.KINDS)
    residual: bool = True
    squeeze: float | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], drop_rate: Float[Array, ""], context: Context, train: bool = False
    ) -> tuple[Float[Array, "b h w c"], None]:
        """Returns `(x, None)`; `drop_rate` is this layer's stochastic depth."""
        h = self.mixer(x, context, train=train)  # [B, H, W, C]
        x = x + self._drop(h, drop_rate, train) if self.residual else h
        if self.squeeze is not None:
            x = SqueezeExcite(self.squeeze, name="gate")(x)  # [B, H, W, C]
        x = x + self._drop(self.ffn(x, train=train), drop_rate, train)  # [B, H, W, C]
        return constrain(x), None

    @nn.nowrap
    def _drop(
        self, h: Float[Array, "b h w c"], drop_rate: Float[Array, ""], train: bool
    ) -> Float[Array, "b h w c"]:
        return drop_path(h, drop_rate, self.make_rng("dropout")) if train and self.has_rng("dropout") else h
