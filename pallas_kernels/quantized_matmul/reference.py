"""The product with a matrix of codes in plain JAX: the specification, and the choice without a kernel."""

import jax
import jax.numpy as jnp


def quantized_matmul(
    x: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None,
    low: jax.Array,
    high: jax.Array | None = None,
    *,
    bits: int,
) -> jax.Array:
    """x W, of the matrix as it is unpacked.

    Args:
      x: `[R, K]`.
      scale: `[G, N]`, of each group of K / G weights.
      zero: `[G, N]` uint8, the code that stands for 0; None means `2^(bits - 1)`.
      low: `[K width / 8, N]` bytes that hold the low pieces of the codes.
      high: likewise the high ones, where a code has two.
      bits: of a code.

    Returns:
      `[R, N]`.
    """
    count = x.shape[1]
    codes = unpacked(low, widths(bits)[0], count)  # [K, N]
    if high is not None:
        codes = codes | unpacked(high, widths(bits)[1], count) << widths(bits)[0]
    grouped = codes.astype(jnp.float32).reshape(scale.shape[0], -1, scale.shape[1])  # [G, K / G, N]
    zeros = 2 ** (bits - 1) if zero is None else zero.astype(jnp.float32)[:, None]
    weights = (grouped - zeros) * scale.astype(jnp.float32)[:, None]
    weights = weights.reshape(codes.shape).astype(x.dtype)
    return jnp.dot(x, weights, preferred_element_type=jnp.float32).astype(x.dtype)


def widths(bits: int) -> tuple[int, ...]:
    """Widths of the pieces of a code, the low one first: powers of two."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def unpacked(plane: jax.Array, width: int, count: int) -> jax.Array:
    """The first pieces that the bytes hold, `[count, N]`; a byte is filled from its lowest bit on."""
    pieces = jnp.stack([(plane >> at) & (2**width - 1) for at in range(0, 8, width)], axis=1)
    return pieces.reshape(-1, plane.shape[1])[:count]
