"""Rounding that can be trained through.

    w ~ s (c - z),    c = clip( [w / s] + [z], 0, 2^b - 1 ),    [.] to the nearest, with the gradient of 1

Where a code is cut off, w moves nothing, s moves it by c - z and z by -s: Esser et al., "Learned Step Size
Quantization", ICLR 2020, section 2.1, with the zero of Bhalgat et al., "LSQ+", 2020.
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


def fake(
    layout: Uniform,
    matrix: Float[Array, "*front k n"],
    scale: Float[Array, "*front g n2"],
    zero: Float[Array, "*front g n2"],
) -> Float[Array, "*front k n"]:
    """The weights that a layout would store, with gradients to weights, scales and zeros."""
    parts = matrix.reshape(*matrix.shape[:-2], scale.shape[-2], -1, matrix.shape[-1])  # [.., G, K / G, N]
    # A scale or zero past its ends comes back from there: the gradient is not cut.
    scale = scale + jax.lax.stop_gradient(jnp.maximum(scale, SMALLEST) - scale)
    zero = zero + jax.lax.stop_gradient(jnp.clip(jnp.round(zero), 0, layout.levels) - zero)
    codes = nearest(parts / scale[..., None, :]) + zero[..., None, :]
    # Not `jnp.clip`, whose gradient is halved on the ends, where half of the codes of two bits lie.
    codes = jnp.where(
        codes < layout.lowest, layout.lowest, jnp.where(codes > layout.levels, layout.levels, codes)
    )
    return ((codes - zero[..., None, :]) * scale[..., None, :]).reshape(matrix.shape)
