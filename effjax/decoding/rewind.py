"""Taking tokens back out of key/value caches.

A token that was written too early is forgotten by two changes: its slot's position becomes negative, so that
no query sees it, and the count of slots in use falls, so that the next token takes its place. Keys and values
stay where they are. Sequences may take back different numbers, so each has its own count from then on.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from effjax.decoding.cache import Cache
from effjax.errors import UsageError
from effjax.layers.stack import each_layer


def rewind(caches: Any, lengths: Int[Array, " b"]) -> Any:
    """Caches as they were before any token at position `lengths` or later was written.

    Args:
      caches: of all layers, with depth in front or apart, in a tree of `Cache`. What is taken back must be
        what was written last; slots of padding in front of a prompt stay in use.
      lengths: tokens that each sequence keeps. One that has no more than that keeps all.

    Returns:
      The caches, with a count of slots in use for every sequence.
    """

    def taken_back(cache: Cache) -> Cache:
        late = cache.positions >= lengths[:, None]  # [B, S]
        return dataclasses.replace(
            cache,
            positions=jnp.where(late, -1, cache.positions),
            written=cache.written - jnp.sum(late, axis=1),
        )

    return jax.tree.map(lambda cache: each_layer(taken_back, cache), caches, is_leaf=_is_cache)


def check_rewinds(model: nn.Module) -> None:
    """Refuses a model that keeps anything else than keys and values, or gives their slots away.

    Raises:
      UsageError: for a recurrent state, a policy that has evicted or merged, or a storage in which slots
        share something: there is no way back.
    """
    policy = getattr(model, "cache", None)
    if policy is not None and not policy.rewinds:
        raise UsageError(
            f"cache={type(policy).__name__} gives slots away that a refused token would have to give back: "
            f"leave the policy out of speculative decoding."
        )
    if policy is not None and not policy.storage.rewinds:
        raise UsageError(
            f"storage={policy.storage} does not give a refused token's slot back: hold keys and values "
            f"plain, or by token without a residual."
        )
    kept = jax.eval_shape(lambda: model.init_cache(1, 2))
    if strange := [leaf for leaf in jax.tree.leaves(kept, is_leaf=_is_cache) if not _is_cache(leaf)]:
        raise UsageError(
            f"tokens cannot be taken back out of what the model keeps: it has a state of the shape "
            f"{strange[0].shape} besides keys and values. Speculative decoding needs attention in all layers."
        )


def _is_cache(leaf: Any) -> bool:
    return isinstance(leaf, Cache)
