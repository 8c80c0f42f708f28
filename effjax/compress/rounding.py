"""Rounding that can be trained through.

    w ~ s (c - z),    c = clip( [w / s] + [z], lowest, highest ),    [.] to the nearest

    inside     dw = 1    ds = [w / s] - w / s    dz = 0
    cut off    dw = 0    ds = c - z              dz = -s

Esser et al., "Learned Step Size Quantization", ICLR 2020, section 2.1, with the zero of Bhalgat et al.,
"LSQ+", 2020.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.compress.storage.uniform import Uniform

# Of a scale; float16 holds nothing much smaller.
SMALLEST = 1e-6


def nearest(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x to the nearest whole number, halves to even, with the gradient of x."""
    return x + jax.lax.stop_gradient(jnp.round(x) - x)


def straight_through(
    x: Float[Array, "..."], scale: Float[Array, "..."], zero: Float[Array, "..."], lowest: int, highest: int
) -> Float[Array, "..."]:
    """The nearest point of a grid, with the gradients of the module's docstring.

    Args:
      x: numbers.
      scale: distance of codes, above 0; as many axes as `x`, against which it broadcasts.
      zero: code that stands for 0, a whole number; likewise.
      lowest: code.
      highest: code.
    """
    codes = nearest(x.astype(jnp.float32) / scale) + zero
    # Not `jnp.clip`, whose gradient is halved on the ends, where half of the codes of two bits lie.
    codes = jnp.where(codes < lowest, lowest, jnp.where(codes > highest, highest, codes))
    return ((codes - zero) * scale).astype(x.dtype)


def fake(
    layout: Uniform,
    matrix: Float[Array, "*front k n"],
    scale: Float[Array, "*front g n2"],
    zero: Float[Array, "*front g n2"],
) -> Float[Array, "*front k n"]:
    """The weights that a layout would store, with gradients to weights, scales and zeros."""
    # A scale or zero past its ends comes back from there: the gradient is not cut.
    scale = scale + jax.lax.stop_gradient(jnp.maximum(scale, SMALLEST) - scale)
    zero = zero + jax.lax.stop_gradient(jnp.clip(jnp.round(zero), 0, layout.levels) - zero)
    return _on_grid(layout, matrix, scale, zero)


def fake_fitted(layout: Uniform, matrix: Float[Array, "*front k n"]) -> Float[Array, "*front k n"]:
    """The same on the grid that the weights span themselves, which has no gradient."""
    return _on_grid(layout, matrix, *layout.fit(jax.lax.stop_gradient(matrix)))


def _on_grid(layout: Uniform, matrix: Array, scale: Array, zero: Array) -> Array:
    parts = matrix.reshape(*matrix.shape[:-2], scale.shape[-2], -1, matrix.shape[-1])  # [.., G, K / G, N]
    y = straight_through(parts, scale[..., None, :], zero[..., None, :], layout.lowest, layout.levels)
    return y.reshape(matrix.shape)
