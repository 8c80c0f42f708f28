"""Caches of a set size, in which new tokens take the place of those that are worth least.

    slot of a new token = argmin worth,    empty slots first, then padding

A prompt that does not fit is read whole, every token seeing every earlier one; then the slots of largest
worth are kept. A policy says what a slot is worth; all else is here. With as many slots as there are tokens
it is the cache that keeps all, slot for slot.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from effjax.decoding.cache import EMPTY, Cache, counted
from effjax.decoding.policies.policy import Look, Policy, Sizes
from effjax.decoding.storage.plain import Plain
from effjax.errors import UsageError

# Worth of what is never evicted while there is anything else.
ALWAYS = float(2**30)


@dataclasses.dataclass(frozen=True)
class Evicting(Policy):
    """Keeps `budget` tokens of each sequence.

    Attributes:
      budget: slots of a sequence, of each layer and head.
    """

    budget: int = 256

    rewinds: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise UsageError(f"budget={self.budget} must be at least 1 slot.")

    def room(self, slots: int) -> int:
        """`budget`, or what the sequence needs where that is less."""
        return min(self.budget, slots)

    def attended(self, tokens: int) -> float:
        """What is held."""
        return float(self.room(tokens))

    def begun(self, cache: Cache, sizes: Sizes) -> Cache:
        """An empty cache; a storage that cannot write just any slot says so now."""
        cache = super().begun(cache, sizes)
        for held, size in ((cache.keys, sizes.head_dim), (cache.values, sizes.value_dim)):
            new = jax.ShapeDtypeStruct((sizes.batch, 1, sizes.groups, size), sizes.dtype)
            jax.eval_shape(self.storage.put, held, new, jax.ShapeDtypeStruct((sizes.batch, 1), jnp.int32))
        return cache

    def worth(self, cache: Cache, newest: Int[Array, " b"]) -> Float[Array, "b slots *groups"]:
        """What each slot is worth that holds a token.

        Args:
          cache: what is held.
          newest: position of each sequence's last token.
        """
        raise NotImplementedError

    def attend(
        self,
        cache: Cache,
        queries: Float[Array, "b n h d"],
        keys: Float[Array, "b n groups d"],
        values: Float[Array, "b n groups e"],
        positions: Int[Array, "b n"],
        look: Look,
    ) -> tuple[Float[Array, "b n h e"], Cache]:
        """Adds tokens in the place of others; of more than there are slots some stay, once all are read."""
        if keys.shape[1] <= cache.slots:
            return super().attend(cache, queries, keys, values, positions, look)
        whole = self.beside(cache, keys, values, positions)  # S + N slots
        y, whole = self.looked(whole, whole.keys, whole.values, keys.shape[1], look)
        return y, self.condense(cache, whole, jnp.max(positions, axis=1))

    def beside(
        self,
        cache: Cache,
        keys: Float[Array, "b n groups d"],
        values: Float[Array, "b n groups e"],
        positions: Int[Array, "b n"],
    ) -> Cache:
        """A cache, in plain form, of what is held and the new tokens behind it."""

        def joined(held: Array | None, fresh: float) -> Array | None:
            if held is None:
                return None
            new = jnp.full((held.shape[0], keys.shape[1], *held.shape[2:]), fresh, held.dtype)
            return jnp.concatenate([held, new], axis=1)

        places = positions.astype(cache.positions.dtype)
        if cache.positions.ndim == 3:
            places = jnp.broadcast_to(places[:, :, None], (*places.shape, keys.shape[2]))
        return dataclasses.replace(
            cache,
            keys=jnp.concatenate([self.read(cache.keys, keys), keys], axis=1),
            values=jnp.concatenate([self.read(cache.values, values), values], axis=1),
            positions=jnp.concatenate([cache.positions, places], axis=1),
            size=joined(cache.size, 1.0),
            score=joined(cache.score, 0.0),
            written=counted(cache.written, positions),
        )

    def condense(self, cache: Cache, whole: Cache, newest: Int[Array, " b"]) -> Cache:
        """The slots of largest worth, in the order they lie in, in the form and the size of `cache`."""
        worth = self.ranked(whole, newest)  # [B, S + N, ...]
        kept = jnp.sort(jnp.argsort(-worth, axis=1, stable=True)[:, : cache.slots], axis=1)
        plain = Plain()
        order = jnp.broadcast_to(jnp.arange(cache.slots)[None], kept.shape[:2])

        def of_kept(held: Array | None) -> Array | None:
            return None if held is None else plain.read_at(held, kept)

        return dataclasses.replace(
            cache,
            keys=self.storage.put(cache.keys, plain.read_at(whole.keys, kept), order),
            values=self.storage.put(cache.values, plain.read_at(whole.values, kept), order),
            positions=of_kept(whole.positions),
            size=of_kept(whole.size),
            score=of_kept(whole.score),
            written=whole.written,
        )

    def ranked(self, cache: Cache, newest: Int[Array, " b"]) -> Float[Array, "b slots *groups"]:
        """`worth`, and below all of it padding, and last what is empty."""
        worth, held = self.worth(cache, newest), cache.positions
        nothing = jnp.where(held == EMPTY, -4 * ALWAYS, -2 * ALWAYS)
        return jnp.where(held >= 0, worth, nothing)

    def add(
        self,
        cache: Cache,
        keys: Float[Array, "b n groups d"],
        values: Float[Array, "b n groups e"],
        positions: Int[Array, "b n"],
    ) -> Cache:
        """Puts new tokens into the slots that are worth least."""
        worth = self.ranked(cache, jnp.max(positions, axis=1))
        if keys.shape[1] == 1:
            slots = jnp.argmin(worth, axis=1)[:, None]  # [B, 1, ...]
        else:
            slots = jnp.argsort(worth, axis=1, stable=True)[:, : keys.shape[1]]  # [B, N, ...]
        return self.place(cache, keys, values, positions, slots)

    def place(
        self,
        cache: Cache,
        keys: Float[Array, "b n groups d"],
        values: Float[Array, "b n groups e"],
        positions: Int[Array, "b n"],
        slots: Int[Array, "b n *groups"],
    ) -> Cache:
        """Puts new tokens into these slots."""
        plain, places = Plain(), positions.astype(cache.positions.dtype)
        if cache.positions.ndim == 3:
            places = jnp.broadcast_to(places[:, :, None], slots.shape)

        def fresh(held: Array | None, number: float) -> Array | None:
            if held is None:
                return None
            new = jnp.full((*slots.shape[:2], *held.shape[2:]), number, held.dtype)
            return plain.put(held, new, slots)

        return dataclasses.replace(
            cache,
            keys=self.storage.put(cache.keys, keys, slots),
            values=self.storage.put(cache.values, values, slots),
            positions=plain.put(cache.positions, places, slots),
            size=fresh(cache.size, 1.0),
            score=fresh(cache.score, 0.0),
            written=counted(cache.written, positions),
        )


def of_each_head(cache: Cache, groups: int, **more: Any) -> Cache:
    """The same cache where each group keeps tokens of its own."""
    positions = jnp.repeat(cache.positions[:, :, None], groups, axis=2)
    return dataclasses.replace(cache, positions=positions, **more)


def numbers(batch: int, slots: int, groups: int, fill: float = 0.0, dtype: DTypeLike = jnp.float32) -> Array:
    """One number for each slot and group."""
    return jnp.full((batch, slots, groups), fill, dtype)
