"""Attention to a cache in plain JAX: the specification, and what runs where there is no kernel."""

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention.within import Within


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    pages: jax.Array | None = None,
    valid: jax.Array | None = None,
    *,
    scale: float,
    cap: float | None = None,
    within: Within | None = None,
) -> jax.Array:
    """The softmax of all seen keys at once; `within` says how kernels compute it and not what.

    Args:
      q: `[B, N, H, D]` queries of the last N tokens of every row.
      k: `[B, S, G, D]` keys, or `[pages, page, G, D]`; `H / G` query heads share one.
      v: `[B, S, G, E]` values, likewise.
      lengths: `[B]` slots in use, the last N of which are the queries' own.
      pages: `[B, P]` the pages of a row, in order.
      valid: `[B, S]` bool, of the slots in use those that hold something.
      scale: factor of the products.
      cap: scores become `cap tanh(scores / cap)`.
      within: no matter.

    Returns:
      `[B, N, H, E]`; zeros for a token that sees nothing.
    """
    del within
    if pages is not None:
        k, v = (gathered(array, pages) for array in (k, v))  # [B, S, G, D]
    batch, tokens, heads, size = q.shape
    slots, groups = k.shape[1:3]
    rows = q.reshape(batch, tokens, groups, heads // groups, size)
    x = jnp.einsum("bngrd,bsgd->bgrns", rows, k, preferred_element_type=jnp.float32) * scale
    x = x if cap is None else cap * jnp.tanh(x / cap)  # [B, G, R, N, S]
    last = lengths[:, None] - (tokens - 1 - jnp.arange(tokens))[None]  # [B, N]
    seen = jnp.arange(slots)[None, None] < last[..., None]  # [B, N, S]
    seen = seen if valid is None else seen & valid[:, None]
    seen = seen[:, None, None]  # [B, 1, 1, N, S]
    top = jnp.max(jnp.where(seen, x, -jnp.inf), axis=-1, keepdims=True)
    powers = jnp.where(seen, jnp.exp(x - jnp.where(top > -jnp.inf, top, 0)), 0)
    total = jnp.sum(powers, axis=-1, keepdims=True)
    weights = (powers / jnp.where(total > 0, total, 1)).astype(v.dtype)
    y = jnp.einsum("bgrns,bsge->bngre", weights, v, preferred_element_type=jnp.float32)
    return y.astype(q.dtype).reshape(batch, tokens, heads, v.shape[-1])  # [B, N, H, E]


def gathered(array: jax.Array, pages: jax.Array) -> jax.Array:
    """`[B, P page, G, D]` of `[pages, page, G, D]`, in the order of the page table."""
    found = jnp.take(array, jnp.maximum(pages, 0), axis=0, mode="clip")  # [B, P, page, G, D]
    return found.reshape(pages.shape[0], -1, *array.shape[2:])
