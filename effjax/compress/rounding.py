"""Rounding that can be trained through.

    w ~ s (c - z),    c = clip( [w / s] + [z], lowest, highest ),    [.] to the nearest

    inside     dw = 1    ds = [w / s] - w / s    dz = 0
    cut off    dw = 0    ds = c - z              dz = -s

Esser et al., "Learned Step Size Quantization", ICLR 2020, section 2.1, with the zero of Bhalgat et al.,
"LSQ+", 2020.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.compress.storage.uniform import Uniform

# Of a scale; float16 holds nothing much smaller.
SMALLEST = 1e-6


def nearest(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x to the nearest whole number, halves to even, with the gradient of x."""
    return x + jax.lax.stop_gradient(jnp.round(x) - x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
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
    codes = jnp.clip(jnp.round(x.astype(jnp.float32) / scale) + zero, lowest, highest)
    return ((codes - zero) * scale).astype(x.dtype)


def _forward(x: Array, scale: Array, zero: Array, lowest: int, highest: int) -> tuple[Array, Any]:
    return straight_through(x, scale, zero, lowest, highest), (x, scale, zero)


def _backward(lowest: int, highest: int, kept: Any, g: Array) -> tuple[Array, Array, Array]:
    x, scale, zero = kept
    steps = x.astype(jnp.float32) / scale
    codes = jnp.round(steps) + zero
    inside = (codes >= lowest) & (codes <= highest)
    to_scale = jnp.where(inside, jnp.round(steps) - steps, jnp.clip(codes, lowest, highest) - zero)
    return (
        jnp.where(inside, g, 0),
        _summed(g * to_scale, scale),
        _summed(g * jnp.where(inside, 0.0, -scale), zero),
    )


def _summed(x: Array, like: Array) -> Array:
    """Over the axes along which something was broadcast."""
    axes = tuple(axis for axis, size in enumerate(like.shape) if size != x.shape[axis])
    return jnp.sum(x, axes, keepdims=True).astype(like.dtype)


straight_through.defvjp(_forward, _backward)


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
