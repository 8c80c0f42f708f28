"""One running batch under one cache policy: the arrays, and the programs that change them.

    join     caches of the prompt[:-1] -> pages of a row          one program for each size of prompts
    advance  every row writes one token                           one program, always of all rows

A prompt is read by itself, padded behind to the next of a few sizes, into a cache that is not paged; then its
slots are copied into the pages of its row. A row therefore holds what it would hold alone. In `advance` rows
meet only in products with the weights, which are of each row by itself; a row that nobody has owns no page,
and nobody reads what it writes.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from effjax.decoding.cache import EMPTY, Cache
from effjax.decoding.policies.policy import Policy
from effjax.decoding.sampling import Sampling, Samplings, in_rows, sample_rows
from effjax.decoding.serving.requests import Request
from effjax.decoding.storage.paged import NONE, Paged
from effjax.decoding.storage.plain import Plain
from effjax.errors import UsageError
from effjax.layers.stack import apart, each_layer, is_apart

# Prompts are padded to this many tokens, or twice as many, and so on.
SMALLEST = 16


@flax.struct.dataclass
class Running:
    """Where the rows of a batch stand between two steps.

    The fields are annotated `Any` because the same class also carries their shapes and shardings.

    Attributes:
      caches: of all layers, paged; depth is in front.
      tokens: `[B]` int, the last token of each row, which no cache holds yet.
      positions: `[B]` int, its place.
      keys: `[B]`, the key of each row's draws.
      drawn: `[B]` int, tokens that were drawn.
      how: `[B]` each, how they are drawn.
    """

    caches: Any
    tokens: Any
    positions: Any
    keys: Any
    drawn: Any
    how: Samplings


class Lane:
    """A running batch.

    Args:
      model: a language model whose layers keep keys and values.
      variables: of the model; where its layers stand apart, so do the caches.
      policy: which tokens a row keeps.
      rows: of the batch.
      length: tokens of the longest sequence.
      page: slots of a page; divides the slots of a row.
      pages: of the pool; None means as many as all rows can need.

    Raises:
      UsageError: for a model or a policy whose rows would depend on each other, a model that keeps something
        else, a policy that holds keys and values in a form of its own, a page that does not divide the slots.
    """

    def __init__(
        self,
        model: nn.Module,
        variables: Any,
        policy: Policy,
        rows: int,
        length: int,
        page: int = 16,
        pages: int | None = None,
    ) -> None:
        if rows < 1:
            raise UsageError(f"rows={rows} must be at least 1.")
        if length < 2:
            raise UsageError(
                f"length={length} must be at least 2 tokens: one to go on from and one to write."
            )
        if policy.storage != Plain():
            raise UsageError(
                f"a running batch holds keys and values in pages, not as {policy.storage}: leave the storage "
                f"of the policy out."
            )
        _check_rows_apart(model, policy)
        self.rows, self.length, self.page = rows, length, page
        self.slots = policy.room(length)
        self.pages = max(rows * self.slots // page, 1) if pages is None else pages
        self.model = model.clone(cache=dataclasses.replace(policy, storage=Paged(page, self.pages)))
        self.reader = model.clone(cache=policy)
        self.variables = variables
        self.sizes = _sizes(length)
        self.running = self._empty()
        self._programs: dict[int, Callable[..., Any]] = {}

    @property
    def pool_bytes(self) -> int:
        """Of the pages of all layers, measured."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._pools()))

    @property
    def cache_bytes(self) -> int:
        """Of all that the caches of all layers hold, measured."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.running.caches))

    def bytes_of(self, pages: int) -> int:
        """What a request with so many pages takes: these, and a row of all else."""
        return self.pool_bytes * pages // self.pages + (self.cache_bytes - self.pool_bytes) // self.rows

    def warm(self) -> None:
        """Compiles all programs."""
        for size in (0, *self.sizes):
            self._program(size)

    def join(self, request: Request, row: int, pages: Sequence[int]) -> None:
        """Reads a prompt into a row's pages; the row goes on from it in the next `advance`."""
        read = len(request.prompt) - 1
        size = next(size for size in self.sizes if size >= read)
        prompt = np.zeros((1, size), np.int32)
        prompt[0, :read] = request.prompt[:-1]
        table = np.full(self.slots // self.page, NONE, np.int32)
        table[: len(pages)] = pages
        numbers = np.asarray([read, row, request.prompt[-1]], np.int32)
        seed = np.uint32(request.seed % 2**32)
        how = in_rows([request.sampling])
        self.running = self._program(size)(self.variables, self.running, prompt, numbers, table, seed, how)

    def advance(self, alive: Bool[np.ndarray, " b"]) -> Int[Array, " b"]:
        """Writes a token in every row; those of rows that are not alive mean nothing.

        A row that is not alive loses its pages here: before they can be another one's.
        """
        self.running, tokens = self._program(0)(self.variables, self.running, alive)
        return tokens

    def _program(self, size: int) -> Callable[..., Any]:
        """`join` for prompts of this many tokens, or, for 0, `advance`."""
        if size not in self._programs:
            if size:
                shapes = (
                    jax.ShapeDtypeStruct((1, size), np.int32),
                    jax.ShapeDtypeStruct((3,), np.int32),
                    jax.ShapeDtypeStruct((self.slots // self.page,), np.int32),
                    jax.ShapeDtypeStruct((), np.uint32),
                    in_rows([Sampling()]),
                )
                made = join.lower(
                    self.model, self.reader, self.variables, self.running, *shapes, length=self.length
                )
            else:
                made = advance.lower(self.model, self.variables, self.running, np.zeros(self.rows, bool))
            self._programs[size] = made.compile()
        return self._programs[size]

    def _empty(self) -> Running:
        caches = self.model.init_cache(self.rows, self.length, _dtype(self.variables))
        depth = caches.written.shape[0]
        caches = dataclasses.replace(caches, written=jnp.zeros((depth, self.rows), jnp.int32))
        return Running(
            # Every array of its own, since all are given up in every step.
            caches=jax.tree.map(jnp.array, apart(caches) if is_apart(self.variables) else caches),
            tokens=jnp.zeros(self.rows, jnp.int32),
            positions=jnp.zeros(self.rows, jnp.int32),
            keys=jax.random.split(jax.random.key(0), self.rows),
            drawn=jnp.zeros(self.rows, jnp.int32),
            how=jax.tree.map(jnp.asarray, in_rows([Sampling()] * self.rows)),
        )

    def _pools(self) -> tuple[Any, Any]:
        caches = self.running.caches
        return caches.keys.pages, caches.values.pages


@functools.partial(jax.jit, static_argnames=("model", "reader", "length"), donate_argnames=("running",))
def join(
    model: nn.Module,
    reader: nn.Module,
    variables: Any,
    running: Running,
    prompt: Int[Array, "1 n"],
    numbers: Int[Array, " 3"],
    table: Int[Array, " each"],
    seed: Array,
    how: Samplings,
    *,
    length: int,
) -> Running:
    """Reads a prompt and puts it into a row.

    Args:
      model: with a paged cache.
      reader: the same with a cache in one array.
      variables: of both.
      running: the batch; its arrays are given up.
      prompt: all tokens but the last, padded behind.
      numbers: how many they are, the row, the last token.
      table: pages of the row.
      seed: of its draws.
      how: they are drawn, of one row.
      length: tokens of the longest sequence.
    """
    count, row, last = numbers[0], numbers[1], numbers[2]
    places = jnp.arange(prompt.shape[1])
    positions = jnp.where(places < count, places, -1)[None]  # [1, N]
    caches = reader.init_cache(1, length, _dtype(variables))
    caches = dataclasses.replace(caches, written=caches.written[:, None])
    caches = apart(caches) if is_apart(variables) else caches
    _, caches = reader.apply(variables, prompt, caches, positions, method="step")

    # The first row that `generate` would write with this seed.
    key = jax.random.fold_in(jax.random.key(seed), 0)
    return Running(
        caches=each_layer(
            functools.partial(_placed, model.cache, row=row, table=table), running.caches, caches
        ),
        tokens=running.tokens.at[row].set(last),
        positions=running.positions.at[row].set(count),
        keys=running.keys.at[row].set(key),
        drawn=running.drawn.at[row].set(0),
        how=jax.tree.map(lambda all_rows, one: all_rows.at[row].set(one[0]), running.how, how),
    )


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("running",))
def advance(
    model: nn.Module, variables: Any, running: Running, alive: Bool[Array, " b"]
) -> tuple[Running, Int[Array, " b"]]:
    """Writes a token in every row; a row that is not alive loses its pages first."""
    caches = dataclasses.replace(
        running.caches, keys=_kept(running.caches.keys, alive), values=_kept(running.caches.values, alive)
    )
    positions = jnp.where(alive, running.positions, -1)
    logits, caches = model.apply(
        variables, running.tokens[:, None], caches, positions[:, None], method="step"
    )  # [B, 1, V]
    keys = jax.vmap(jax.random.fold_in)(running.keys, running.drawn)
    tokens = sample_rows(logits[:, 0], keys, running.how).astype(jnp.int32)  # [B]
    running = dataclasses.replace(
        running, caches=caches, tokens=tokens, positions=positions + 1, drawn=running.drawn + 1
    )
    return running, tokens


def _kept(pool: Any, alive: Bool[Array, " b"]) -> Any:
    """The pool without the tables of those who are not alive."""

    def table(held: Array) -> Array:
        return jnp.where(alive.reshape(*(1,) * (held.ndim - 2), -1, 1), held, NONE)

    return dataclasses.replace(pool, table=jax.tree.map(table, pool.table))


def _placed(
    policy: Policy, cache: Cache, new: Cache, row: Int[Array, ""], table: Int[Array, " each"]
) -> Cache:
    """One layer's cache with what a prompt left in a cache of its own in one row."""
    storage, axes = policy.storage, policy.axes()
    assert isinstance(storage, Paged)

    def rest(held: Any, names: Any, one: Any) -> Any:
        return jax.tree.map(
            lambda names, held, one: held.at[row].set(one[0]), names, held, one, is_leaf=_is_names
        )

    return dataclasses.replace(
        cache,
        keys=storage.place(cache.keys, row, table, new.keys[0]),
        values=storage.place(cache.values, row, table, new.values[0]),
        # Padding has done its work: the slots behind the prompt are free again, from the first on.
        positions=rest(cache.positions, axes.positions, jnp.where(new.positions < 0, EMPTY, new.positions)),
        written=cache.written.at[row].set(new.written[0]),
        size=rest(cache.size, axes.size, new.size),
        score=rest(cache.score, axes.score, new.score),
        state=rest(cache.state, axes.state, new.state),
    )


def _is_names(leaf: Any) -> bool:
    return type(leaf) is tuple and all(isinstance(name, str | None) for name in leaf)


def _sizes(length: int) -> tuple[int, ...]:
    """To which prompts are padded: doubling, up to the longest."""
    sizes, size = [], SMALLEST
    while size < length:
        sizes.append(size)
        size *= 2
    return (*sizes, length)


def _dtype(variables: Any) -> Any:
    return jnp.result_type(*jax.tree.leaves(variables["params"]))


def _check_rows_apart(model: nn.Module, policy: Policy) -> None:
    """Refuses what would not give a row what it gets alone."""
    for names in jax.tree.leaves(policy.axes().state, is_leaf=_is_names):
        if names[:1] != ("batch",):
            raise UsageError(
                f"{type(policy).__name__} remembers something that all rows share: rows that join at any "
                f"step cannot be served with it."
            )
    if not hasattr(model, "cache"):
        raise UsageError(
            f"{type(model).__name__} keeps no keys and values that a policy could choose among: serve a "
            f"model of kind 'lm'."
        )
    ffn: Any = getattr(getattr(model, "block", None), "ffn", None)
    factors = [getattr(ffn, name, None) for name in ("eval_capacity", "capacity")]
    factor = next((factor for factor in factors if factor is not None), None)
    if factor is not None and factor * ffn.chosen < ffn.experts:
        raise UsageError(
            f"experts of capacity={factor:g} drop tokens by what stands beside them: serve the model with "
            f"eval_capacity={ffn.experts / ffn.chosen:g}, which drops none."
        )
