"""Sigmoid attention in plain JAX: the specification, and what runs where there is no kernel."""

import jax
import jax.numpy as jnp


def sigmoid_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None = None,
    *,
    scale: float,
    bias: float,
    causal: bool,
) -> jax.Array:
    """sigmoid(scale q k^T + bias) v, where a query may see a key.

    Args:
      q: `[B, N, H, D]` queries.
      k: `[B, S, G, D]` keys; `H / G` query heads share one.
      v: `[B, S, G, E]` values.
      segments: `[B, N]` int, where N = S: a query sees keys of its own segment; None means all.
      scale: factor of the products.
      bias: added to the logits.
      causal: whether a query sees no later key; the last query stands with the last key.

    Returns:
      `[B, N, H, E]`.
    """
    batch, queries, heads, size = q.shape
    keys, groups = k.shape[1:3]
    rows = q.reshape(batch, queries, groups, heads // groups, size)
    logits = jnp.einsum("bngrd,bsgd->bgrns", rows, k, preferred_element_type=jnp.float32)
    weights = jax.nn.sigmoid(logits * scale + bias).reshape(batch, heads, queries, keys)  # [B, H, N, S]
    if causal:
        distance = keys - queries + jnp.arange(queries)[:, None] - jnp.arange(keys)[None, :]
        weights = jnp.where((distance >= 0)[None, None], weights, 0)
    if segments is not None:
        same = segments[:, :, None] == segments[:, None, :]
        weights = jnp.where(same[:, None], weights, 0)
    weights = weights.astype(v.dtype).reshape(batch, groups, heads // groups, queries, keys)
    y = jnp.einsum("bgrns,bsge->bngre", weights, v, preferred_element_type=jnp.float32)
    return y.astype(q.dtype).reshape(batch, queries, heads, v.shape[-1])  # [B, N, H, E]
