"""Focal modulation: every place is multiplied by a summary of what surrounds it, from near to far.

    z^l = gelu(depthwise_l(z^(l-1))),  kernels k, k + 2, k + 4, ...     l = 1 .. L,   z^0 = W_z x + b_z
    z^(L+1) = gelu(mean of z^L over all places)
    m_i = h(sum_l g_i^l z_i^l),                                         g = W_g x + b_g,   l = 1 .. L + 1
    y_i = W_y (q_i * m_i) + b_y,                                        q = W_q x + b_q

`h` is a projection too. A place sees 1 + sum_l (k_l - 1) places a side through the levels and all of them
through the mean; the cost is linear in their number.

Source: Focal Modulation Networks, Yang et al. 2022, section 3.2, equations 4 to 7.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.errors import UsageError
from effjax.layers.dense import Dense
from effjax.layers.depthwise import DepthwiseConv
from effjax.layers.norms import NormKind, norm
from effjax.mixers.context import Context


class FocalModulation(nn.Module):
    """Modulation by gated contexts of growing reach.

    Attributes:
      levels: how many depthwise convolutions L follow one another.
      kernel: side k of the first, which is odd.
      growth: by how much a kernel is larger than the one before it.
      norm: a norm on the modulated values, a kind in `effjax.layers.norms`; None leaves it out.
      epsilon: of that norm.
      averaged: whether the gated sum is divided by its L + 1 terms.
    """

    levels: int = 2
    kernel: int = 3
    growth: int = 2
    norm: NormKind | None = None
    epsilon: float = 1e-5
    averaged: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel % 2 == 0 or self.growth % 2:
            raise UsageError(
                f"kernel={self.kernel} and growth={self.growth} give kernels without a middle: an odd kernel "
                "and an even growth are needed."
            )

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], context: Context, train: bool = False
    ) -> Float[Array, "b h w c"]:
        """Modulates every place."""
        channels, axes = x.shape[-1], ("embed", "mlp")
        query = Dense(channels, axes, name="queries")(x)  # [B, H, W, C]
        z = Dense(channels, axes, name="contexts")(x)  # [B, H, W, C]
        gates = Dense(self.levels + 1, ("embed", None), name="gates")(x)  # [B, H, W, L + 1]
        total = jnp.zeros_like(z)
        for level in range(self.levels):
            size = self.kernel + self.growth * level
            z = _gelu(DepthwiseConv(size, use_bias=False, name=f"levels_{level}")(z))  # [B, H, W, C]
            total = total + z * gates[..., level : level + 1]
        everywhere = _gelu(jnp.mean(z, (1, 2), keepdims=True))  # [B, 1, 1, C]
        total = total + everywhere * gates[..., self.levels :]  # [B, H, W, C]
        if self.averaged:
            total = total / (self.levels + 1)
        y = query * Dense(channels, axes, name="modulator")(total)  # [B, H, W, C]
        if self.norm is not None:
            y = norm(self.norm, self.epsilon, "norm", train=train)(y)
        return Dense(channels, ("mlp", "embed"), name="projection")(y)  # [B, H, W, C]


def _gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jax.nn.gelu(x, approximate=False)
