"""How a diffusion time steers a network: its embedding, and vectors that shift, scale and gate.

Source: Peebles and Xie, "Scalable Diffusion Models with Transformers", ICCV 2023, section 3.2.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.layers.dense import Dense, zeros

_normal = nn.initializers.normal(0.02)


def modulate(
    x: Float[Array, "b n c"], shift: Float[Array, "b c"], scale: Float[Array, "b c"]
) -> Float[Array, "b n c"]:
    """Scales by `1 + scale` and shifts every token of an example alike."""
    return x * (1 + scale[:, None]) + shift[:, None]


def time_frequencies(
    t: Float[Array, " b"], count: int, longest: float = 10_000.0, inclusive: bool = False
) -> Float[Array, "b count"]:
    """Cosines, then sines, of `t` times `count / 2` frequencies that fall from 1 towards `1 / longest`.

    `inclusive` spaces them so that the last one is `1 / longest`, as diffusers does. Computed in float32,
    whatever the network computes in: at `t = 999` half precision would lose the phase.
    """
    half = count // 2
    frequencies = jnp.exp(-math.log(longest) * jnp.arange(half, dtype=jnp.float32) / (half - inclusive))
    angle = t.astype(jnp.float32)[:, None] * frequencies[None]  # [B, count / 2]
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class Modulation(nn.Module):
    """`parts` vectors of `dim` channels from the conditioning: silu(c) W + b, zero at the start.

    Attributes:
      parts: how many vectors.
      dim: channels of each.
    """

    parts: int
    dim: int

    @nn.compact
    def __call__(self, c: Float[Array, "b cond"]) -> tuple[Float[Array, "b dim"], ...]:
        """Returns the vectors in the order they are used."""
        axes = ("embed", None, "mlp")
        out = Dense((self.parts, self.dim), axes, kernel_init=zeros, name="projection")(nn.silu(c))
        return tuple(out[:, i] for i in range(self.parts))  # parts x [B, C]


class TimeEmbed(nn.Module):
    """Turns a time into a vector: frequencies, then two layers with SiLU between them.

    Attributes:
      dim: channels of the vector.
      frequencies: sines and cosines together.
      inclusive: whether the last frequency is the lowest itself, see `time_frequencies`.
    """

    dim: int
    frequencies: int = 256
    inclusive: bool = False

    @nn.compact
    def __call__(self, t: Float[Array, " b"], dtype: jax.typing.DTypeLike) -> Float[Array, "b dim"]:
        """Embeds times in the unit of training steps, 0 to 1000; `dtype` is what the network computes in."""
        h = time_frequencies(t, self.frequencies, inclusive=self.inclusive).astype(dtype)  # [B, frequencies]
        h = Dense(self.dim, (None, "mlp"), kernel_init=_normal, name="expand")(h)  # [B, C]
        return Dense(self.dim, ("mlp", "embed"), kernel_init=_normal, name="contract")(nn.silu(h))  # [B, C]
