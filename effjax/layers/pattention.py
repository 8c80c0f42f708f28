"""Token-parameter attention: a projection whose parameters are key and value tokens.

    S = X K^T,    Y = Theta(S) V                                             K [n, c], V [n, o]

    norm_gelu   Theta(S)_i = gelu(tau S_i / |S|)
    gelu_norm   Theta(S)_i = tau gelu(S_i) / |gelu(S)|
    softmax     Theta(S)_i = tau^2 exp(S_i) / sum_j exp(S_j)

with norms over the n parameter tokens and tau = sqrt(n). Parameter tokens have no order, and with tau held
one whose key is zero takes no part under the first two: its score is zero, its weight gelu(0) = 0, and no
norm sees it. So a trained layer takes up further tokens without a change of its outputs, see
`effjax.compress.tokenformer`. Wang et al., "TokenFormer", 2024, arXiv:2410.23168, section 3.2. All released
checkpoints have the order `norm_gelu`.
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.layers.activations import gelu
from effjax.layers.dense import Dense

Theta = Literal["norm_gelu", "gelu_norm", "softmax"]


def weigh(scores: Float[Array, "*batch n"], kind: Theta, tau: float) -> Float[Array, "*batch n"]:
    """Theta of the scores, in float32 inside; what tau stands for is in the head of this file.

    Next to a row of zeros the slope is bounded by an addend of 1e-10 to the squared norm.
    """
    wide = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    if kind == "softmax":
        return (jax.nn.softmax(wide, axis=-1) * tau**2).astype(scores.dtype)
    if kind == "gelu_norm":
        wide = gelu(wide)
    wide = wide * (tau * jax.lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + 1e-10))
    return (gelu(wide) if kind == "norm_gelu" else wide).astype(scores.dtype)


class Pattention(nn.Module):
    """A projection of the last `inputs` axes onto `features` through `slots` parameter tokens.

    The key tokens are the columns of `keys/kernel`, the value tokens the rows of `values/kernel`.

    Attributes:
      features: size of the output axis, or sizes of several.
      slots: how many parameter tokens.
      axes: logical names of the input axes and of the output axes.
      inputs: how many trailing axes of the input are contracted.
      theta: how scores become weights.
      scale_slots: `tau` is the root of this; None means of `slots`. Growth holds it.
      value_stddev: of the value tokens at the start; key tokens start at 0.02.
    """

    features: int | tuple[int, ...]
    slots: int
    axes: tuple[str | None, ...] = ("embed", "embed")
    inputs: int = 1
    theta: Theta = "norm_gelu"
    scale_slots: int | None = None
    value_stddev: float = 0.02

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Maps `[..., *inputs]` to `[..., *features]`."""
        into, out = self.axes[: self.inputs], self.axes[self.inputs :]
        draw = nn.initializers.normal
        keys = Dense(self.slots, (*into, "mlp"), self.inputs, False, draw(0.02), name="keys")
        values = Dense(self.features, ("mlp", *out), 1, False, draw(self.value_stddev), name="values")
        tau = (self.slots if self.scale_slots is None else self.scale_slots) ** 0.5
        weights = weigh(keys(x), self.theta, tau)  # [..., n]
        return values(weights)  # [..., *features]
