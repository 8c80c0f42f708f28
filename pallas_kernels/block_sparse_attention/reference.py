"""Attention over blocks in plain JAX: the specification, and what runs where there is no kernel."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse_attention.pyramid import counts, resolutions


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    levels: jax.Array,
    *,
    depth: int,
    queries: int,
    keys: int,
    scale: float,
    causal: bool,
    shares: Any = None,
) -> jax.Array:
    """The softmax over all keys of all resolutions, of which those of a block's level alone are seen.

    Args:
      q: `[B, N, H, D]` queries.
      k: `[B, S, G, D]` keys.
      v: `[B, S, G, E]` values.
      levels: `[B, L, I, J]`, of blocks of queries and of keys; 0 is not read. `H / L` heads share them.
      depth: the largest level.
      queries: of a block.
      keys: of a block.
      scale: factor of the products.
      causal: whether a query sees no later key; blocks that are seen in part have level 1, later ones 0.
      shares: no matter.

    Returns:
      `[B, N, H, E]`.
    """
    del shares
    batch, length, heads, size = q.shape
    groups, lists = k.shape[2], levels.shape[1]
    fine_k, fine_v = (resolutions(array.astype(jnp.float32), 1, depth, keys) for array in (k, v))
    all_k, all_v = (jnp.concatenate(arrays, axis=1).astype(q.dtype) for arrays in (fine_k, fine_v))
    stands_for = [counts(k.shape[1], array.shape[1], level) for level, array in enumerate(fine_k)]
    bias = jnp.concatenate([jnp.log(jnp.asarray(count)) for count in stands_for])  # [S'], -inf for none
    place = jnp.arange(bias.size)[None]
    # Means stand before all queries that see them.
    early = (place >= fine_k[0].shape[1]) | (place <= jnp.arange(length)[:, None] + (k.shape[1] - length))

    def of_group(_: None, group: tuple[jax.Array, ...]) -> tuple[None, jax.Array]:
        own_q, own_k, own_v, own = group  # [B, N, R, D], [B, S', D], [B, S', E], [B, L/G, I, J]
        seen = [
            jnp.repeat(own == level + 1, keys >> level, axis=3)[..., : array.shape[1]]
            for level, array in enumerate(fine_k)
        ]
        seen_at = jnp.repeat(jnp.concatenate(seen, axis=3), queries, axis=2)[:, :, :length]  # [B, L/G, N, S']
        seen_at = jnp.repeat(seen_at & early[None, None] if causal else seen_at, heads // lists, axis=1)
        logits = jnp.einsum("bnrd,bsd->brns", own_q, own_k, preferred_element_type=jnp.float32)
        logits = jnp.where(seen_at, logits * scale + bias[None, None, None], -jnp.inf)  # [B, R, N, S']
        top = lax.stop_gradient(jnp.max(logits, axis=3, keepdims=True))
        powers = jnp.exp(logits - jnp.where(top > -jnp.inf, top, 0.0))
        total = jnp.sum(powers, axis=3, keepdims=True)
        weights = (powers / jnp.where(total > 0, total, 1.0)).astype(v.dtype)
        y = jnp.einsum("brns,bse->bnre", weights, own_v, preferred_element_type=jnp.float32)
        return None, y.astype(q.dtype)

    # A head of keys after the other: the logits of all are more than most memories hold.
    by_group = (
        jnp.moveaxis(q.reshape(batch, length, groups, heads // groups, size), 2, 0),
        jnp.moveaxis(all_k, 2, 0),
        jnp.moveaxis(all_v, 2, 0),
        jnp.moveaxis(levels.reshape(batch, groups, lists // groups, *levels.shape[2:]), 1, 0),
    )
    _, y = lax.scan(of_group, None, by_group)  # [G, B, N, R, E]
    return jnp.moveaxis(y, 0, 2).reshape(batch, length, heads, v.shape[-1])
