"""The product with the blocks of a sparse matrix in plain JAX: the specification, and what runs elsewhere."""

import jax
import jax.numpy as jnp


def columns_of(starts: jax.Array, blocks: int) -> jax.Array:
    """`[B]`, the column of every block: how many columns end before it."""
    return jnp.sum(starts[None, 1:] <= jnp.arange(blocks)[:, None], axis=1, dtype=jnp.int32)


def block_sparse_matmul(x: jax.Array, values: jax.Array, inputs: jax.Array, starts: jax.Array) -> jax.Array:
    """Inputs are gathered for every block, multiplied, and summed by column.

    Args:
      x: `[R, K]`.
      values: `[B, k, n]`, by column.
      inputs: `[B]` int32, the row of every block.
      starts: `[N / n + 1]` int32, the first block of every column.

    Returns:
      `[R, N]`, in the type of x.
    """
    blocks, k, n = values.shape
    taken = x.reshape(x.shape[0], -1, k)[:, inputs]  # [R, B, k]
    # Whole products, also where a TPU would round float32 to bfloat16 first.
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    parts = jnp.einsum(
        "rbk,bkn->brn", taken, values.astype(x.dtype), precision=exact, preferred_element_type=jnp.float32
    )
    columns = starts.shape[0] - 1
    summed = jax.ops.segment_sum(
        parts, columns_of(starts, blocks), num_segments=columns, indices_are_sorted=True
    )  # [N / n, R, n]
    return jnp.swapaxes(summed, 0, 1).reshape(x.shape[0], columns * n).astype(x.dtype)
