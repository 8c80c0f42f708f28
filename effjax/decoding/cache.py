"""The key/value cache of one attention layer.

A token written once is never projected again: step t attends with the queries of its new tokens to the keys
and values of all tokens so far, so that n tokens cost O(n^2) multiplications instead of O(n^3).

Every slot knows the position of its token, and a query at position p sees the slots of positions 0 to p.
Where a slot lies says nothing, so a policy (`effjax.decoding.policies`) that evicts, merges or reorders slots
is a pure update of these arrays. In which form keys and values are held (`effjax.decoding.storage`) is no
concern of a policy's.
"""

import dataclasses
from typing import Any

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from effjax.decoding.storage.plain import Plain
from effjax.decoding.storage.storage import Storage
from effjax.errors import UsageError

# The position of a slot that nothing was ever written to; padding stands at other negative positions.
EMPTY = -(2**30)


@flax.struct.dataclass
class Cache:
    """Keys and values of up to `slots` tokens; the caches of all layers are one tree with depth in front.

    The fields are annotated `Any` because the same class also carries their shapes and shardings.

    Attributes:
      keys: `[B, slots, groups, D]`, after normalisation and rotation; in the form of a storage.
      values: `[B, slots, groups, D]`, as projected; likewise.
      positions: `[B, slots]` int, place of each slot's token in its sequence; negative where a slot holds
        nothing, or padding. `[B, slots, groups]` where heads keep different tokens.
      written: `[]` int, tokens so far with padding, the same for all sequences: where the next tokens go, but
        where a policy chooses slots. Or `[B]`, where every sequence has its own; see `append`.
      size: `[B, slots, groups]` float, how many tokens a slot stands for; None where it is always one.
      score: `[B, slots, groups]` float, how much each slot was attended to; None where nobody asks.
      state: what a policy remembers besides.
    """

    keys: Any
    values: Any
    positions: Any
    written: Any
    size: Any = None
    score: Any = None
    state: Any = None

    @property
    def slots(self) -> int:
        """How many there are for each sequence."""
        return self.positions.shape[1]


# Names of the axes, for the rules that lay a cache out on a mesh.
AXES = Cache(
    keys=("batch", "slots", "kv_heads", "head_dim"),
    values=("batch", "slots", "kv_heads", "head_dim"),
    positions=("batch", "slots"),
    written=(),
)


def init_cache(
    batch: int,
    slots: int,
    groups: int,
    head_dim: int,
    dtype: DTypeLike = jnp.float32,
    storage: Storage = Plain(),  # noqa: B008 (it is frozen)
    value_dim: int | None = None,
) -> Cache:
    """Makes an empty cache for `slots` tokens of `groups` key/value heads, see `Policy.init`."""
    return Cache(
        keys=storage.empty("keys", batch, slots, groups, head_dim, dtype),
        values=storage.empty("values", batch, slots, groups, value_dim or head_dim, dtype),
        positions=jnp.full((batch, slots), EMPTY, jnp.int32),
        written=jnp.zeros((), jnp.int32),
    )


def append(
    cache: Cache,
    keys: Float[Array, "b n groups d"],
    values: Float[Array, "b n groups e"],
    positions: Int[Array, "b n"],
    storage: Storage = Plain(),  # noqa: B008
) -> Cache:
    """Writes `n` tokens into the next slots.

    Args:
      cache: with at least `n` free slots; how many are free is known only at run time, so more tokens than
        that overwrite the last slots. `generate` makes its caches large enough.
      keys: stored in the cache's form.
      values: stored in the cache's form.
      positions: negative for padding, which is stored and never seen. Where every sequence has its own count
        of slots, padding stands behind the tokens, and the next ones overwrite it.
      storage: that form.

    Raises:
      UsageError: for more tokens than the cache has slots.
    """
    count = keys.shape[1]
    if count > cache.slots:
        raise UsageError(f"{count} tokens do not fit a cache of {cache.slots} slots: make it larger.")
    written = counted(cache.written, positions)
    tokens = written - cache.written if written.ndim else None
    return dataclasses.replace(
        cache,
        keys=storage.append(cache.keys, keys, cache.written, tokens),
        values=storage.append(cache.values, values, cache.written, tokens),
        positions=Plain().append(cache.positions, positions, cache.written),
        written=written,
    )


def counted(written: Int[Array, "*b"], positions: Int[Array, "b n"]) -> Int[Array, "*b"]:
    """Tokens so far, with new ones at these positions."""
    return written + (jnp.sum(positions >= 0, axis=1) if written.ndim == 1 else positions.shape[1])


def visible(
    held: Int[Array, "b slots *groups"],
    positions: Int[Array, "b n"],
    causal: bool = True,
    window: Int[Array, ""] | int | None = None,
) -> Bool[Array, "b _ _ slots"]:
    """Which slots (last axis) queries may see: what is held and, if causal, no later.

    Args:
      held: positions of the slots, of all heads alike or of each group.
      positions: of the queries.
      causal: whether a query sees no later positions.
      window: how many tokens back it sees, itself included; None means all.

    Returns:
      `[B, 1 or groups, 1 or N, slots]`.
    """
    held = held[:, None, None, :] if held.ndim == 2 else jnp.moveaxis(held, 2, 1)[:, :, None, :]
    at = positions[:, None, :, None]  # [B, 1, N, 1]
    allowed = held >= 0  # [B, 1 or G, 1, S]
    if causal:
        allowed = allowed & (held <= at)
    return allowed if window is None else allowed & (held > at - window)
