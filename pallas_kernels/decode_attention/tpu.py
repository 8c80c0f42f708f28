"""Decoding by Mosaic TPU: blocks of the cache come by as they lie in memory, all heads in one product.

A cache `[B, S, G, D]` is `[B, S G, D]` without a copy, and a block of it holds some slots of all heads. All
queries are multiplied by all of it, `[R, D] x [D, slots G]`, and the scores of other heads' keys are masked:
the matrix unit takes as long for 8 rows as for 32, and no head has to be picked out of its neighbours.

    grid (batch, blocks)    blocks one after the other, those behind the length are not fetched

`places` says for each pair of a query and a column of a block which slot of the block it is, counted so that
the length of the row is the limit of all queries, and `NEVER` for other heads' keys: one comparison masks.

Pages come as several operands, the same array with the index of another page each, so that several are on
their way at a time.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blocks import blocks
from pallas_kernels.decode_attention import cost
from pallas_kernels.decode_attention.within import Within
from pallas_kernels.lint import masks
from pallas_kernels.op import Interpret, Unsupported
from pallas_kernels.padding import padded, rounded

# Rows of a block of the cache: slots times heads. 4096 of 128 channels are 1 MB of keys and 1 MB of values.
BLOCKS = {"columns": 4096}
DTYPES = ("bfloat16", "float32")
# Channels lie along the lanes, and a cache of fewer is read with what fills them up.
HEADS = (128, 256)
# Slots are a multiple of the lanes, and of so many rows of 16-bit numbers registers are made.
ROWS, LANES = 16, 128
MOST_PAGES = 16
VECTOR_MEMORY = 32 * 2**20
# Scores of a block, so that several arrays of them fit.
MOST_SCORES = 2**19
NEVER = 2**30


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    pages: jax.Array | None = None,
    valid: jax.Array | None = None,
    *,
    scale: float,
    cap: float | None,
    within: Within | None,
    interpret: Interpret,
) -> jax.Array:
    """As the reference."""
    if q.dtype.name not in DTYPES:
        raise Unsupported(f"decode_attention on TPU takes {' or '.join(DTYPES)}, not {q.dtype}.")
    if not interpret and any(size not in HEADS for size in (q.shape[-1], v.shape[-1])):
        raise Unsupported(
            f"decode_attention on TPU takes heads of {' or '.join(map(str, HEADS))} channels, not"
            f" {q.shape[-1]} and {v.shape[-1]}: others would be filled up, and more be read than XLA reads."
        )
    batch, tokens, heads, size = q.shape
    groups, values = k.shape[2], v.shape[-1]
    columns = blocks("decode_attention", f"d{size}", BLOCKS)["columns"]
    columns = min(columns, MOST_SCORES // rounded(tokens * heads, ROWS))
    blocked = _Unpaged(k, columns) if pages is None else _Paged(k, pages, columns)
    k, v = (array.reshape(array.shape[0], -1, array.shape[-1]) for array in (k, v))  # [B, S G, D]
    rows = padded(q.reshape(batch, tokens * heads, size), 1, ROWS)  # [B, R, D]
    places = _places(tokens, heads, groups, blocked.keys, rows.shape[1])  # [R, columns]
    of_a_row = lambda b, j, *_: (b, 0, 0)  # noqa: E731
    specs = [
        pl.BlockSpec((None, rows.shape[1], size), of_a_row),
        pl.BlockSpec(places.shape, lambda b, j, *_: (0, 0)),
    ]
    specs += [*blocked.specs(size), *blocked.specs(values)]
    arrays = [rows, jnp.asarray(places), *[k] * blocked.each, *[v] * blocked.each]
    if valid is not None:
        columns = blocked.keys * groups
        every = jnp.repeat(valid.astype(jnp.int32), groups, axis=1)[:, None]  # [B, 1, S G]
        arrays.append(padded(every, 2, columns))
        specs.append(pl.BlockSpec((None, 1, columns), lambda b, j, *_: (b, 0, j)))
    scratch = [
        pltpu.VMEM((rows.shape[1], 1), jnp.float32),
        pltpu.VMEM((rows.shape[1], 1), jnp.float32),
        pltpu.VMEM((rows.shape[1], values), jnp.float32),
        pltpu.SMEM((1,), jnp.int32),
    ]
    step = _Step(blocked, scale, cap, within, valid is not None, q.dtype == jnp.float32)
    scalars = [lengths] if pages is None else [lengths, pages]
    edges = range(2, 2 + 2 * blocked.each) if blocked.ragged else ()
    out = pl.pallas_call(
        functools.partial(step, len(scalars)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(batch, blocked.blocks),
            in_specs=specs,
            out_specs=pl.BlockSpec((None, rows.shape[1], values), of_a_row),
            scratch_shapes=scratch,
        ),
        out_shape=jax.ShapeDtypeStruct((batch, rows.shape[1], values), q.dtype),
        name="decode_attention",
        metadata=masks(*(f"in[{edge}]" for edge in edges)),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VECTOR_MEMORY
        ),
        cost_estimate=cost.forward(q, k.reshape(*blocked.shape, size), v, lengths, pages, valid),
        interpret=interpret,
    )(*scalars, *arrays)
    return out[:, : tokens * heads].reshape(batch, tokens, heads, values)


def _places(tokens: int, heads: int, groups: int, keys: int, rows: int) -> np.ndarray:
    """Slot of the block `[R, keys groups]`, counted from the last that the query sees; a row is `n H + h`."""
    row, column = np.arange(rows)[:, None], np.arange(keys * groups)[None]
    token, head = row // heads, row % heads
    own = (head // (heads // groups) == column % groups) & (token < tokens)
    return np.where(own, column // groups + (tokens - 1 - token), NEVER).astype(np.int32)


class _Unpaged:
    """A cache of a row after the other, cut into blocks of slots; the last one may stand over the end."""

    def __init__(self, k: jax.Array, columns: int):
        self.shape, self.each = k.shape[:3], 1
        _, self.slots, self.groups, _ = k.shape
        self.keys = min(max(columns // self.groups // LANES, 1) * LANES, rounded(self.slots, ROWS))
        self.blocks = -(-self.slots // self.keys)
        self.ragged = bool(self.slots % self.keys)

    def specs(self, last: int) -> list[pl.BlockSpec]:
        def index(b: Any, j: Any, lengths: Any) -> tuple[Any, ...]:
            # Of blocks behind the length the last one in use is named again: it is there.
            used = lax.div(jnp.maximum(jnp.minimum(lengths[b], self.slots), 1) - 1, self.keys)
            return b, jnp.minimum(j, used), 0

        return [pl.BlockSpec((None, self.keys * self.groups, last), index)]


class _Paged:
    """A cache in pages, of which a block has several."""

    ragged = False

    def __init__(self, k: jax.Array, pages: jax.Array, columns: int):
        self.shape, self.page, self.groups = k.shape[:3], k.shape[1], k.shape[2]
        if self.page * self.groups % ROWS:
            raise Unsupported(
                f"decode_attention on TPU takes pages whose slots times heads are a multiple of {ROWS}, not"
                f" {self.page} times {self.groups}."
            )
        self.of_a_row = pages.shape[1]
        self.slots = self.page * self.of_a_row
        self.each = min(max(columns // (self.page * self.groups), 1), MOST_PAGES, self.of_a_row)
        self.keys = self.each * self.page
        self.blocks = -(-self.of_a_row // self.each)

    def specs(self, last: int) -> list[pl.BlockSpec]:
        def index(i: int) -> Callable[..., tuple[Any, ...]]:
            def of_page(b: Any, j: Any, lengths: Any, pages: Any) -> tuple[Any, ...]:
                used = lax.div(jnp.maximum(jnp.minimum(lengths[b], self.slots), 1) - 1, self.page)
                # A row without slots in use may have no page.
                return jnp.maximum(pages[b, jnp.minimum(j * self.each + i, used)], 0), 0, 0

            return of_page

        block = (None, self.page * self.groups, last)
        return [pl.BlockSpec(block, index(i)) for i in range(self.each)]


class _Step:
    """What is done with a block of the cache."""

    def __init__(
        self,
        blocked: _Unpaged | _Paged,
        scale: float,
        cap: float | None,
        within: Within | None,
        masked: bool,
        exact: bool,
    ):
        self.blocked, self.scale, self.cap = blocked, scale, cap
        self.unify, self.within, self.masked = within is not None, within or Within(), masked
        self.precision = lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT

    def __call__(self, scalars: int, lengths: Any, *references: Any) -> None:
        each = self.blocked.each
        q, places, *cached = references[scalars - 1 :]
        k, v, rest = cached[:each], cached[each : 2 * each], cached[2 * each :]
        valid, (out, top, total, summed, off) = (rest[0] if self.masked else None), rest[self.masked :]
        b, j = pl.program_id(0), pl.program_id(1)
        length = jnp.minimum(lengths[b], self.blocked.slots)
        start = j * self.blocked.keys

        @pl.when(j == 0)
        def _() -> None:
            top[...] = jnp.full_like(top, self.within.phi if self.unify else -math.inf)
            total[...] = jnp.zeros_like(total)
            summed[...] = jnp.zeros_like(summed)
            off[0] = 0

        def seen() -> jax.Array:
            there = places[...] < length - start  # [R, columns]
            return there if valid is None else there & (valid[...] > 0)

        def values() -> jax.Array:
            loaded = _joined(v)  # [columns, E]
            if not self.blocked.ragged:
                return loaded
            # What stands over the end of the array may not be a number.
            row = lax.broadcasted_iota(jnp.int32, loaded.shape, 0) + start * self.blocked.groups
            return jnp.where(row < self.blocked.slots * self.blocked.groups, loaded, 0)

        @pl.when(start < length)
        def _() -> None:
            x = self.dot(q[...], _joined(k), 1) * self.scale  # [R, columns]
            x = x if self.cap is None else self.cap * jnp.tanh(x / self.cap)
            if not self.unify:
                self.running(jnp.where(seen(), x, -math.inf), values(), top, total, summed)
                return
            away = jnp.max(jnp.where(seen(), jnp.abs(x - self.within.middle), 0.0))
            off[0] = jnp.where(away < self.within.half, off[0], 1)  # also where it is no number

            # Loaded where they are used: what is alive over a branch is kept in memory, and x is enough.
            @pl.when(off[0] == 0)
            def _() -> None:
                masked = jnp.where(seen(), x, -math.inf)
                self.add(jnp.exp(masked - self.within.phi), values(), total, summed)

            @pl.when(off[0] != 0)
            def _() -> None:
                self.running(jnp.where(seen(), x, -math.inf), values(), top, total, summed)

        @pl.when(j == self.blocked.blocks - 1)
        def _() -> None:
            y = summed[...] / jnp.where(total[...] > 0, total[...], 1.0)
            out[...] = y.astype(out.dtype)

    def running(self, x: Any, values: Any, top: Any, total: Any, summed: Any) -> None:
        """Adds a block after what came before is scaled by the new maximum; scores not seen are -inf."""
        # Until something is seen phi is no maximum.
        old = jnp.where(total[...] > 0, top[...], -math.inf)  # [R, 1]
        new = jnp.maximum(old, jnp.max(x, axis=1, keepdims=True))
        new = jnp.where(new > -math.inf, new, 0.0)
        scaled = jnp.exp(old - new)
        top[...] = new
        total[...] *= scaled
        summed[...] *= scaled
        self.add(jnp.exp(x - new), values, total, summed)

    def add(self, powers: Any, values: Any, total: Any, summed: Any) -> None:
        total[...] += jnp.sum(powers, axis=1, keepdims=True)
        summed[...] += self.dot(powers.astype(values.dtype), values, 0)  # [R, E]

    def dot(self, a: Any, b: Any, over: int) -> jax.Array:
        """a b in float32, or a b^T where it is summed over the second side of b."""
        axes = (((1,), (over,)), ((), ()))
        return lax.dot_general(a, b, axes, precision=self.precision, preferred_element_type=jnp.float32)


def _joined(references: list[Any]) -> jax.Array:
    parts = [reference[...] for reference in references]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=0)
