"""The feed-forward layer of TokenFormer: one token-parameter attention.

y = Theta(x K^T) V                                          Wang et al. 2024, arXiv:2410.23168, section 3.2
"""

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from effjax.layers.pattention import Pattention, Theta


class PattentionFFN(nn.Module):
    """Token-parameter attention from a width to itself.

    Attributes:
      slots: how many parameter tokens.
      theta: how scores become weights, see `effjax.layers.pattention`.
      scale_slots: `tau` is the root of this; None means of `slots`.
      value_stddev: of the value tokens at the start.
    """

    slots: int
    theta: Theta = "norm_gelu"
    scale_slots: int | None = None
    value_stddev: float = 0.02

    @nn.compact
    def __call__(self, x: Float[Array, "*batch c"], train: bool = False) -> Float[Array, "*batch c"]:
        """Mixes the channels of each token."""
        options: dict[str, Any] = dict(
            theta=self.theta, scale_slots=self.scale_slots, value_stddev=self.value_stddev
        )
        return Pattention(x.shape[-1], self.slots, name="pattention", **options)(x)  # [..., C]
