"""In which form the rows of a running batch hold what their texts need.

    paged   keys and values in pages of one pool: a row takes pages for the slots that its text can fill
    whole   a row's arrays are its own, and full size from the start: keys and values in few bits, of which
            several slots share a scale, and states, which do not grow

Either way a row holds what a cache of its own would hold, and only that row's tokens ever change it.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from effjax.decoding.cache import EMPTY, Cache
from effjax.decoding.policies.policy import Policy
from effjax.decoding.storage.paged import NONE, Paged
from effjax.decoding.storage.plain import Plain
from effjax.errors import UsageError
from effjax.mixers.cached import KeyValue, Recurrent


@dataclasses.dataclass(frozen=True)
class WholeRows:
    """Every row has arrays of its own.

    Attributes:
      model: that writes.
      reader: that reads prompts, each into a cache by itself.
      slots: of a row.
      page: slots that a row takes at a time.
      pages: that there are for all rows.
      behind: whether prompts are padded behind, so that their slots are the first; a state wants padding in
        front, before it begins.
    """

    model: nn.Module
    reader: nn.Module
    slots: int
    page: int
    pages: int
    behind: bool = True

    def placed(self, held: Any, new: Any, row: Int[Array, ""], table: Int[Array, " each"]) -> Any:
        """One layer's arrays with what a prompt left in a cache of its own.

        Args:
          held: of all rows.
          new: of the prompt, a batch of one.
          row: whose it is.
          table: pages of the row.
        """
        del table
        return jax.tree.map(lambda held, new: held.at[row].set(new[0]), held, freed(new))

    def kept(self, caches: Any, alive: Bool[Array, " b"]) -> Any:
        """All layers' caches without the pages of rows that are not alive."""
        del alive
        return caches

    def pool(self, caches: Any) -> Any:
        """The arrays in it that rows share."""
        del caches
        return ()


@dataclasses.dataclass(frozen=True)
class PagedRows(WholeRows):
    """Rows share a pool; the model's policy holds keys and values in pages."""

    def placed(self, held: Cache, new: Cache, row: Int[Array, ""], table: Int[Array, " each"]) -> Cache:
        """One layer's arrays with what a prompt left; keys and values go into the row's pages."""
        storage: Paged = self.model.cache.storage
        keys = storage.place(held.keys, row, table, new.keys[0])
        values = storage.place(held.values, row, table, new.values[0])
        nothing: dict[str, Any] = dict(keys=(), values=())
        rest = super().placed(
            dataclasses.replace(held, **nothing), dataclasses.replace(new, **nothing), row, table
        )
        return dataclasses.replace(rest, keys=keys, values=values)

    def kept(self, caches: Cache, alive: Bool[Array, " b"]) -> Cache:
        """The caches without the tables of rows that are not alive."""

        def table(held: Array) -> Array:
            return jnp.where(alive.reshape(*(1,) * (held.ndim - 2), -1, 1), held, NONE)

        def pool(held: Any) -> Any:
            return dataclasses.replace(held, table=jax.tree.map(table, held.table))

        return dataclasses.replace(caches, keys=pool(caches.keys), values=pool(caches.values))

    def pool(self, caches: Cache) -> Any:
        """The pages of keys and values."""
        return caches.keys.pages, caches.values.pages


def freed(cache: Any) -> Any:
    """What a prompt left, where the padding behind it has done its work: its slots are free again."""
    if not isinstance(cache, Cache):
        return cache
    return dataclasses.replace(cache, positions=jnp.where(cache.positions < 0, EMPTY, cache.positions))


def rows_of(
    model: nn.Module, policy: Policy | None, rows: int, length: int, page: int, pages: int | None
) -> WholeRows:
    """How so many rows of a model hold sequences of up to `length` tokens.

    Args:
      model: a language model.
      policy: which tokens a row keeps; None of a model whose layers keep a state.
      rows: of the batch.
      length: tokens of the longest sequence.
      page: slots of a page, where there are any.
      pages: of the pool; None means as many as all rows can need.

    Raises:
      UsageError: for a model or a policy that cannot be served.
    """
    mixer = getattr(getattr(model, "block", None), "mixer", None)
    _check_rows_apart(model)
    if isinstance(mixer, Recurrent):
        if policy is not None:
            raise UsageError(
                f"{type(policy).__name__} chooses among keys and values, and {type(mixer).__name__} keeps a "
                f"state of a set size instead: serve it without a cache policy."
            )
        return WholeRows(model, model, slots=length, page=length, pages=rows, behind=False)
    cached = getattr(model, "init_cache", None) if isinstance(mixer, KeyValue) else None
    if cached is None or not isinstance(jax.eval_shape(lambda: cached(1, 2)), Cache):
        named = type(model if mixer is None or isinstance(mixer, KeyValue) else mixer).__name__
        raise UsageError(
            f"{named} keeps something else than keys and values, or a state of a set size, of every layer: "
            f"serve a model of kind 'lm' whose mixer is attention or recurrent."
        )
    policy = Policy() if policy is None else policy
    _check_states_apart(policy)
    slots, reader = policy.room(length), model.clone(cache=policy)
    if isinstance(policy.storage, Paged):
        raise UsageError(
            f"a running batch shares out pages itself, and knows no {policy.storage}: leave the storage of "
            f"the policy out, and give page and pages of the lane."
        )
    if not isinstance(policy.storage, Plain):
        return WholeRows(reader, reader, slots=slots, page=slots, pages=rows)
    pages = max(rows * slots // page, 1) if pages is None else pages
    paged = dataclasses.replace(policy, storage=Paged(page, pages))
    return PagedRows(model.clone(cache=paged), reader, slots, page, pages)


def _check_rows_apart(model: nn.Module) -> None:
    """Refuses layers that would not give a row what it gets alone."""
    ffn: Any = getattr(getattr(model, "block", None), "ffn", None)
    factors = [getattr(ffn, name, None) for name in ("eval_capacity", "capacity")]
    factor = next((factor for factor in factors if factor is not None), None)
    if factor is not None and factor * ffn.run < ffn.experts:
        raise UsageError(
            f"experts of capacity={factor:g} drop tokens by what stands beside them: serve the model with "
            f"eval_capacity={ffn.experts / ffn.run:g}, which drops none."
        )


def _check_states_apart(policy: Policy) -> None:
    """Refuses policies that remember something of all rows together."""
    for names in jax.tree.leaves(policy.axes().state, is_leaf=_is_names):
        if names[:1] != ("batch",):
            raise UsageError(
                f"{type(policy).__name__} remembers something that all rows share: rows that join at any "
                f"step cannot be served with it."
            )


def _is_names(leaf: Any) -> bool:
    return type(leaf) is tuple and all(isinstance(name, str | None) for name in leaf)
