"""One running batch under one cache policy: the arrays, and the programs that change them.

    join     caches of the prompt[:-1] -> a row                   one program for each size of prompts
    advance  every row writes one token                           one program, always of all rows

A prompt is read by itself, padded to the next of a few sizes, into a cache of its own, which is then copied
into its row (`effjax.decoding.serving.rows` says in which form). A row therefore holds what it would hold
alone. In `advance` rows meet only in products with the weights, which are of each row by itself; a row that
nobody has owns no page, and nobody reads what it writes.
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
from jaxtyping import Array, Bool, Int, UInt32

from effjax.decoding.policies.policy import Policy
from effjax.decoding.prefill import new_caches
from effjax.decoding.sampling import Sampling, Samplings, in_rows, sample_rows
from effjax.decoding.serving.requests import Request
from effjax.decoding.serving.rows import WholeRows, rows_of
from effjax.decoding.storage.paged import NONE
from effjax.errors import UsageError
from effjax.layers.stack import each_layer

# Prompts are padded to this many tokens, or twice as many, and so on.
SMALLEST = 16


@flax.struct.dataclass
class Running:
    """Where the rows of a batch stand between two steps.

    The fields are annotated `Any` because the same class also carries their shapes and shardings.

    Attributes:
      caches: of all layers; depth is in front, then rows or pages.
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
      model: a language model whose layers keep keys and values, or a state.
      variables: of the model; where its layers stand apart, so do the caches.
      policy: which tokens a row keeps; None of layers that keep a state.
      rows: of the batch.
      length: tokens of the longest sequence.
      page: slots of a page; divides the slots of a row. Rows that are whole have no pages, see `rows_of`.
      pages: of the pool; None means as many as all rows can need.

    Raises:
      UsageError: for a model or a policy whose rows would depend on each other, a model that keeps something
        else, a page that does not divide the slots.
    """

    def __init__(
        self,
        model: nn.Module,
        variables: Any,
        policy: Policy | None,
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
        self.held = rows_of(model, policy, rows, length, page, pages)
        self.policy = self.held.reader.cache
        self.rows, self.length = rows, length
        self.slots, self.page, self.pages = self.held.slots, self.held.page, self.held.pages
        self.model = self.held.model
        self.variables = variables
        self.sizes = _sizes(length)
        self.running = self._empty()
        self._programs: dict[int, Callable[..., Any]] = {}

    @property
    def told(self) -> str:
        """What its rows keep, for people: the policy with every field, or that it is a state."""
        return "a state" if self.policy is None else repr(self.policy)

    @property
    def pool_bytes(self) -> int:
        """Of the pages of all layers, measured."""
        return _bytes(self.held.pool(self.running.caches))

    @property
    def cache_bytes(self) -> int:
        """Of all that the caches of all layers hold, measured."""
        return _bytes(self.running.caches)

    def bytes_of(self, pages: int) -> int:
        """What a request with so many pages takes: these, and a row of all else."""
        return self.pool_bytes * pages // self.pages + (self.cache_bytes - self.pool_bytes) // self.rows

    def warm(self) -> None:
        """Compiles all programs."""
        for size in (0, *self.sizes):
            self._program(size)

    def join(self, request: Request, row: int, pages: Sequence[int]) -> None:
        """Reads a prompt into a row and its pages; the row goes on from it in the next `advance`."""
        read = len(request.prompt) - 1
        size = next(size for size in self.sizes if size >= read)
        first = 0 if self.held.behind else size - read
        prompt = np.zeros((1, size), np.int32)
        prompt[0, first : first + read] = request.prompt[:-1]
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
            given = self.variables, self.running
            if size:
                shapes = (
                    jax.ShapeDtypeStruct((1, size), np.int32),
                    jax.ShapeDtypeStruct((3,), np.int32),
                    jax.ShapeDtypeStruct((self.slots // self.page,), np.int32),
                    jax.ShapeDtypeStruct((), np.uint32),
                    in_rows([Sampling()]),
                )
                made = join.lower(self.held, *given, *shapes, length=self.length)
            else:
                made = advance.lower(self.held, *given, np.zeros(self.rows, bool))
            self._programs[size] = made.compile()
        return self._programs[size]

    def _empty(self) -> Running:
        caches = _apart_rows(self.model, self.variables, self.rows, self.length)
        return Running(
            # Every array of its own, since all are given up in every step.
            caches=jax.tree.map(jnp.array, caches),
            tokens=jnp.zeros(self.rows, jnp.int32),
            positions=jnp.zeros(self.rows, jnp.int32),
            keys=jax.random.split(jax.random.key(0), self.rows),
            drawn=jnp.zeros(self.rows, jnp.int32),
            how=jax.tree.map(jnp.asarray, in_rows([Sampling()] * self.rows)),
        )


@functools.partial(jax.jit, static_argnames=("held", "length"), donate_argnames=("running",))
def join(
    held: WholeRows,
    variables: Any,
    running: Running,
    prompt: Int[Array, "1 n"],
    numbers: Int[Array, " 3"],
    table: Int[Array, " each"],
    seed: UInt32[Array, ""],
    how: Samplings,
    *,
    length: int,
) -> Running:
    """Reads a prompt and puts it into a row.

    Args:
      held: how the rows hold theirs.
      variables: of the model.
      running: the batch; its arrays are given up.
      prompt: all tokens but the last, padded.
      numbers: how many they are, the row, the last token.
      table: pages of the row.
      seed: of its draws.
      how: they are drawn, of one row.
      length: tokens of the longest sequence.
    """
    count, row, last = numbers[0], numbers[1], numbers[2]
    size = prompt.shape[1]
    places = jnp.arange(size)
    positions = jnp.where(places < count, places, -1) if held.behind else places - (size - count)  # [N]
    caches = _apart_rows(held.reader, variables, 1, length)
    _, caches = held.reader.apply(variables, prompt, caches, positions[None], method="step")

    # The first row that `generate` would write with this seed.
    key = jax.random.fold_in(jax.random.key(seed), 0)
    return Running(
        caches=each_layer(functools.partial(held.placed, row=row, table=table), running.caches, caches),
        tokens=running.tokens.at[row].set(last),
        positions=running.positions.at[row].set(count),
        keys=running.keys.at[row].set(key),
        drawn=running.drawn.at[row].set(0),
        how=jax.tree.map(lambda all_rows, one: all_rows.at[row].set(one[0]), running.how, how),
    )


@functools.partial(jax.jit, static_argnames=("held",), donate_argnames=("running",))
def advance(
    held: WholeRows, variables: Any, running: Running, alive: Bool[Array, " b"]
) -> tuple[Running, Int[Array, " b"]]:
    """Writes a token in every row; a row that is not alive loses its pages first."""
    caches = held.kept(running.caches, alive)
    positions = jnp.where(alive, running.positions, -1)
    logits, caches = held.model.apply(
        variables, running.tokens[:, None], caches, positions[:, None], method="step"
    )  # [B, 1, V]
    keys = jax.vmap(jax.random.fold_in)(running.keys, running.drawn)
    tokens = sample_rows(logits[:, 0], keys, running.how).astype(jnp.int32)  # [B]
    running = dataclasses.replace(
        running, caches=caches, tokens=tokens, positions=positions + 1, drawn=running.drawn + 1
    )
    return running, tokens


def _apart_rows(model: nn.Module, variables: Any, rows: int, length: int) -> Any:
    """Empty caches in which every row counts its own tokens."""
    caches = new_caches(model, variables, rows, length)

    def counted(written: Array) -> Array:
        return jnp.zeros((*written.shape, rows), written.dtype)

    return dataclasses.replace(caches, written=jax.tree.map(counted, caches.written))


def _sizes(length: int) -> tuple[int, ...]:
    """To which prompts are padded: doubling, up to the longest."""
    sizes, size = [], SMALLEST
    while size < length:
        sizes.append(size)
        size *= 2
    return (*sizes, length)


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
