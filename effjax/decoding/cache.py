"""The key/value cache of one attention layer.

A token written once is never projected again: step t attends with the queries of its new tokens to the keys
and values of all tokens so far, so that n tokens cost O(n^2) multiplications instead of O(n^3).

Every slot knows the position of its token, and a query at position p sees the slots of positions 0 to p.
Where a slot lies says nothing, so a policy that evicts, merges or reorders slots is a pure update of these
arrays.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from effjax.errors import UsageError


@flax.struct.dataclass
class Cache:
    """Keys and values of up to `slots` tokens; the caches of all layers are one tree with depth in front.

    The fields are annotated `Any` because the same class also carries their shapes and shardings.

    Attributes:
      keys: `[B, slots, groups, D]`, after normalisation and rotation.
      values: `[B, slots, groups, D]`, as projected.
      positions: `[B, slots]` int, place of each slot's token in its sequence; negative where a slot holds
        nothing, or padding.
      written: `[]` int, slots in use, the same for all sequences: where the next tokens go. Or `[B]`, where
        every sequence has its own; see `append`.
    """

    keys: Any
    values: Any
    positions: Any
    written: Any


# Names of the axes, for the rules that lay a cache out on a mesh.
AXES = Cache(
    keys=("batch", "slots", "kv_heads", "head_dim"),
    values=("batch", "slots", "kv_heads", "head_dim"),
    positions=("batch", "slots"),
    written=(),
)


def init_cache(batch: int, slots: int, groups: int, head_dim: int, dtype: DTypeLike = jnp.float32) -> Cache:
    """Makes an empty cache for `slots` tokens of `groups` key/value heads."""
    shape = (batch, slots, groups, head_dim)
    return Cache(
        keys=jnp.zeros(shape, dtype),
        values=jnp.zeros(shape, dtype),
        positions=jnp.full((batch, slots), -1, jnp.int32),
        written=jnp.zeros((), jnp.int32),
    )


def append(
    cache: Cache,
    keys: Float[Array, "b n groups d"],
    values: Float[Array, "b n groups d"],
    positions: Int[Array, "b n"],
) -> Cache:
    """Writes `n` tokens into the next slots.

    Args:
      cache: with at least `n` free slots; how many are free is known only at run time, so more tokens than
        that overwrite the last slots. `generate` makes its caches large enough.
      keys: stored in the cache's dtype.
      values: stored in the cache's dtype.
      positions: negative for padding, which is stored and never seen. Where every sequence has its own count
        of slots, padding stands behind the tokens, and the next ones overwrite it.

    Raises:
      UsageError: for more tokens than the cache has slots.
    """
    count, slots = keys.shape[1], cache.keys.shape[1]
    if count > slots:
        raise UsageError(f"{count} tokens do not fit a cache of {slots} slots: make it larger.")

    own = cache.written.ndim == 1

    def write(held: Array, new: Array) -> Array:
        put = jax.lax.dynamic_update_slice_in_dim
        if own:
            return jax.vmap(put, (0, 0, 0, None))(held, new.astype(held.dtype), cache.written, 0)
        return put(held, new.astype(held.dtype), cache.written, axis=1)

    return Cache(
        keys=write(cache.keys, keys),
        values=write(cache.values, values),
        positions=write(cache.positions, positions),
        written=cache.written + (jnp.sum(positions >= 0, axis=1) if own else count),
    )


def visible(cache: Cache, positions: Int[Array, "b n"], causal: bool = True) -> Bool[Array, "b 1 _ slots"]:
    """Which slots (last axis) queries at these positions may see: what is held and, if causal, no later."""
    held = cache.positions[:, None, None, :]  # [B, 1, 1, S]
    allowed = held >= 0
    return allowed & (held <= positions[:, None, :, None]) if causal else allowed
