"""The product with a matrix in planes of signs, in plain JAX: the specification."""

import jax
import jax.numpy as jnp

from pallas_kernels.quantized_matmul.reference import unpacked


def binary_coded_matmul(x: jax.Array, alpha: jax.Array, offset: jax.Array, signs: jax.Array) -> jax.Array:
    """x W, of the matrix as it is decoded.

    Args:
      x: `[R, K]`.
      alpha: `[q, G, N]`.
      offset: `[G, N]`.
      signs: `[q, K / 8, N]` bytes; a bit of 1 is a plus.

    Returns:
      `[R, N]`.
    """
    groups, columns = offset.shape
    weights = offset.astype(jnp.float32)[:, None]  # [G, 1, N]
    for plane, scale in zip(signs, alpha, strict=True):
        sign = 2 * unpacked(plane, 1, x.shape[1]).astype(jnp.float32) - 1  # [K, N]
        weights = weights + sign.reshape(groups, -1, columns) * scale.astype(jnp.float32)[:, None]
    weights = weights.reshape(-1, columns).astype(x.dtype)
    return jnp.dot(x, weights, preferred_element_type=jnp.float32).astype(x.dtype)
