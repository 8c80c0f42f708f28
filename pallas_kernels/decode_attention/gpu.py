"""Decoding by Mosaic GPU for Hopper: a program has some slots of a row, and all queries that share a head.

    grid (parts, heads of keys, batch)

Tiles of keys and values come by TMA while the one before is multiplied. The queries of a tile are filled up
to the 64 rows of a wgmma by copies of the last one: at 4.8 TB/s and 64 rows the products of a tile need about
a third of the time in which it comes. Parts are cut at run time, by the length of each row, so that all of
them have work. Each gives its result and the logarithm of its sum, and XLA joins them.

With `within` there is no maximum and nothing is rescaled; a part that met a score outside reads its slots
once more, with the running maximum. In float16, which holds nothing between 0 and e^-17 and above e^11, it is
always the running one.

Powers are those of two: e^x = 2^(x log2 e). The hardware's tanh errs by 2^-11, so it is not used for capping.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import versions
from pallas_kernels.blocks import blocks
from pallas_kernels.decode_attention import cost
from pallas_kernels.decode_attention.within import Within
from pallas_kernels.emulate import emulated
from pallas_kernels.op import Interpret, Unsupported
from pallas_kernels.padding import padded, rounded

# Slots of a tile, tiles that are under way at a time, and how many programs there shall be.
BLOCKS = {"keys": 64, "stages": 2, "programs": 264}
DTYPES = ("bfloat16", "float16")
# Channels that stand side by side in shared memory: 128 bytes. A cache is not copied to fill them up.
UNIT, LARGEST_HEAD = 64, 128
# Rows of a wgmma.
ROWS = 64
LOG2E = math.log2(math.e)


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
        raise Unsupported(f"decode_attention on GPU takes {' or '.join(DTYPES)}, not {q.dtype}.")
    if any(size % UNIT or size > LARGEST_HEAD for size in (q.shape[-1], v.shape[-1])):
        raise Unsupported(
            f"decode_attention on GPU takes heads of {UNIT} or {LARGEST_HEAD} channels, not {q.shape[-1]} and"
            f" {v.shape[-1]}."
        )
    batch, tokens, heads, size = q.shape
    groups, values = k.shape[2], v.shape[-1]
    parts = _Parts(q, k, v, pages, valid, scale, cap, within)
    programs = batch, groups * parts.tiles, parts.splits
    plgpu = versions.mosaic_gpu()
    kernel = versions.mosaic_gpu_kernel(
        parts.body,
        out=(
            jax.ShapeDtypeStruct((*programs, parts.given, values), jnp.float32),
            jax.ShapeDtypeStruct((*programs, ROWS), jnp.float32),
        ),
        scratch=[
            plgpu.SMEM((ROWS, size), q.dtype),
            plgpu.SMEM((parts.stages, parts.keys, size), q.dtype),
            plgpu.SMEM((parts.stages, parts.keys, values), q.dtype),
            plgpu.SMEM((ROWS, UNIT), jnp.float32),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=2 + (valid is not None), num_barriers=parts.stages),
            *([] if valid is None else [plgpu.SMEM((parts.stages, parts.keys), jnp.float32)]),
        ],
        grid=(parts.splits, groups * parts.tiles, batch),
        grid_names=("part", "head", "batch"),
        name="decode_attention",
        cost=cost.forward(q, k, v, lengths, pages, valid),
        approximate=True,
    )
    out, logs = (emulated(kernel) if interpret else kernel)(*parts.arrays(lengths))
    y = _joined(out, logs[..., : parts.given])  # [B, G T, rows, E]
    rows = y.reshape(batch, groups, -1, values)[:, :, : parts.rows]
    rows = rows.reshape(batch, groups, tokens, -1, values).swapaxes(1, 2)  # [B, N, G, R, E]
    return rows.reshape(batch, tokens, heads, values).astype(q.dtype)


def _joined(out: jax.Array, logs: jax.Array) -> jax.Array:
    """Results of parts `[B, G, P, R, E]`, weighted by their sums, of which the logarithms are given."""
    if out.shape[2] == 1:
        return out[:, :, 0]
    top = jnp.max(logs, axis=2, keepdims=True)
    weights = jnp.exp(logs - jnp.where(top > -jnp.inf, top, 0))
    total = jnp.sum(weights, axis=2)[..., None]
    return jnp.sum(out * weights[..., None], axis=2) / jnp.where(total > 0, total, 1)


class _Parts:
    """How the arrays are cut, and what a program does.

    Attributes:
      rows: queries that share a head, of all tokens; row `n R + r` is query r of token n.
      tiles: of 64 of them.
      given: rows of a tile that leave the kernel.
      slots: of a row of the cache, and of a short one those that fill up a tile.
      most: of them those that may be in use.
      keys: slots of a tile.
      splits: parts into which the slots in use are cut.
    """

    def __init__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        pages: jax.Array | None,
        valid: jax.Array | None,
        scale: float,
        cap: float | None,
        within: Within | None,
    ):
        chosen = blocks("decode_attention", f"d{q.shape[-1]}", BLOCKS)
        self.scale, self.cap = scale, cap
        self.unify = within is not None and q.dtype != jnp.float16
        self.within = within or Within()
        batch, self.tokens, heads, size = q.shape
        self.groups = k.shape[2]
        self.each = heads // self.groups
        self.rows = self.tokens * self.each
        self.tiles = -(-self.rows // ROWS)
        self.given = rounded(min(self.rows, ROWS), 8)
        grouped = q.reshape(batch, self.tokens, self.groups, self.each, size).swapaxes(1, 2)
        grouped = grouped.reshape(batch, self.groups, self.rows, size)
        more = self.tiles * ROWS - self.rows
        self.q = jnp.pad(grouped, ((0, 0), (0, 0), (0, more), (0, 0)), mode="edge")  # [B, G, T 64, D]
        self.pages, self.valid = pages, None
        self.keys, self.stages = chosen["keys"], chosen["stages"]
        if pages is None:
            # The last tile is moved back into the array, over slots of the one before. Tiles of shared memory
            # have 8 rows, and copies start at one of them.
            if k.shape[1] % 8 and k.shape[1] > self.keys:
                raise Unsupported(
                    f"decode_attention on GPU takes a cache of a multiple of 8 slots, not {k.shape[1]}: it"
                    " would have to be copied."
                )
            self.most = k.shape[1]
            k, v = (padded(x, 1, self.keys) if x.shape[1] < self.keys else x for x in (k, v))
            self.slots = k.shape[1]
        else:
            self.page, self.slots = k.shape[1], k.shape[1] * pages.shape[1]
            self.most = self.slots
            self.keys = next((n for n in (64, 32, 16) if self.page % n == 0), 0)
            self.in_a_page = self.page // max(self.keys, 1)
            if not self.keys:
                raise Unsupported(
                    f"decode_attention on GPU takes pages of a multiple of 16 slots, not {self.page}."
                )
        if valid is not None:
            # Rows of a multiple of 16 bytes, and not less than a tile.
            self.valid = padded(valid.astype(jnp.float32), 1, self.keys)
        self.k, self.v = k, v
        programs = batch * self.groups * self.tiles
        self.splits = max(min(-(-chosen["programs"] // programs), -(-self.slots // self.keys)), 1)
        self.plgpu = versions.mosaic_gpu()

    def arrays(self, lengths: jax.Array) -> list[jax.Array]:
        """What the kernel reads."""
        return [x for x in (lengths, self.pages, self.valid, self.q, self.k, self.v) if x is not None]

    def body(self, lengths: Any, *others: Any) -> None:
        references = list(others)
        pages = references.pop(0) if self.pages is not None else None
        valid = references.pop(0) if self.valid is not None else None
        q, k, v, out, logs, q_tile, k_tiles, v_tiles, out_tile, log_tile, q_arrived, arrived, *more = (
            references
        )
        part, head, b = (lax.axis_index(axis) for axis in ("part", "head", "batch"))
        group = lax.div(head, self.tiles) if self.tiles > 1 else head
        tile = lax.rem(head, self.tiles) if self.tiles > 1 else 0
        length = jnp.minimum(lengths[b], self.most)
        used = lax.div(jnp.maximum(length, 0) + (self.keys - 1), self.keys)
        share = lax.div(used + (self.splits - 1), self.splits)
        first = jnp.minimum(part * share, used)
        count = jnp.minimum(share, used - first)
        self.plgpu.copy_gmem_to_smem(q.at[b, group, pl.ds(tile * ROWS, ROWS)], q_tile, q_arrived)
        self.plgpu.barrier_wait(q_arrived)

        def start_of(j: Any) -> Any:
            start = (first + j) * self.keys
            return start if self.pages is not None else jnp.minimum(start, self.slots - self.keys)

        def fetch(j: Any, slot: Any) -> None:
            start = start_of(j)
            row, place = b, start
            if pages is not None:
                row = pages[b, lax.div(first + j, self.in_a_page)]
                # Written so that the compiler sees that it is a multiple of the tile.
                place = lax.rem(first + j, self.in_a_page) * self.keys if self.in_a_page > 1 else 0
            for cached, tiles in ((k, k_tiles), (v, v_tiles)):
                source = cached.at[row, pl.ds(place, self.keys), group]
                self.plgpu.copy_gmem_to_smem(source, tiles.at[slot], arrived.at[slot])
            if valid is not None:
                self.plgpu.copy_gmem_to_smem(
                    valid.at[b, pl.ds(start, self.keys)], more[0].at[slot], arrived.at[slot]
                )

        def stream(step: Callable[..., Any], carry: Any) -> Any:
            """Calls a step for each tile of the part."""
            for slot in range(self.stages):
                pl.when(slot < count)(functools.partial(fetch, slot, slot))

            def one(j: Any, carry: Any) -> Any:
                slot = lax.rem(j, self.stages)
                self.plgpu.barrier_wait(arrived.at[slot])
                x = self.scores(q_tile, k_tiles.at[slot])  # [64, keys]
                there = None if valid is None else more[0].at[slot]
                seen = self.seen(x.shape, tile * ROWS, start_of(j), (first + j) * self.keys, length, there)
                carry = step(x, seen, v_tiles.at[slot], carry)
                pl.when(j + self.stages < count)(lambda: fetch(j + self.stages, slot))
                return carry

            return lax.fori_loop(0, count, one, carry)

        def put(summed: Any, total: Any, top: Any) -> None:
            """Writes the result of a part, some channels at a time, and the logarithm of its sum."""
            divisor = jnp.where(total > 0, total, 1.0)
            result = summed / lax.broadcast_in_dim(divisor, summed.shape, [0])
            log_tile[...] = jnp.where(total > 0, top / LOG2E + jnp.log(divisor), -math.inf)
            self.plgpu.commit_smem()
            self.plgpu.copy_smem_to_gmem(log_tile, logs.at[b, head, part])
            rows = pl.ds(0, self.given)
            for channel in range(0, result.shape[1], UNIT):
                channels = pl.ds(channel, UNIT)
                out_tile[...] = lax.slice(result, (0, channel), (ROWS, channel + UNIT))
                self.plgpu.commit_smem()
                self.plgpu.copy_smem_to_gmem(out_tile.at[rows], out.at[b, head, part, :, channels])
                self.plgpu.wait_smem_to_gmem(0)

        def running() -> None:
            put(*stream(self.running, (self.zeros(v.shape[-1]), self.zeros(), self.zeros() - math.inf)))

        if not self.unify:
            running()
        else:
            summed, total, away = pl.run_scoped(
                lambda into: self.unified(stream, into), self.plgpu.ACC((ROWS, v.shape[-1]), jnp.float32)
            )
            log_tile[...] = away
            self.plgpu.commit_smem()
            inside = log_tile[0] < self.within.half
            for row in range(1, min(self.rows, ROWS)):
                inside &= log_tile[row] < self.within.half
            pl.when(inside)(lambda: put(summed, total, self.zeros() + self.within.phi * LOG2E))
            pl.when(jnp.logical_not(inside))(running)

    def zeros(self, *last: int) -> jax.Array:
        layout = self.plgpu.Layout.WGMMA if last else self.plgpu.Layout.WGMMA.reduce(1)
        return self.plgpu.layout_cast(jnp.zeros((ROWS, *last), jnp.float32), layout)

    def scores(self, q_tile: Any, k_tile: Any) -> jax.Array:
        """Scores of all queries of a tile and all its keys."""

        def scoped(into: Any) -> jax.Array:
            self.plgpu.wgmma(into, q_tile, k_tile.T)
            return into[...]

        x = pl.run_scoped(scoped, self.plgpu.ACC((ROWS, self.keys), jnp.float32)) * self.scale
        if self.cap is None:
            return x
        # tanh y = 1 - 2 / (1 + e^2y)
        return self.cap - 2 * self.cap / (1 + jnp.exp2(x * (2 * LOG2E / self.cap)))

    def seen(
        self, shape: tuple[int, ...], row: Any, start: Any, fresh: Any, length: Any, there: Any
    ) -> jax.Array:
        """Which slots of a tile from `start` on a query sees; those before `fresh` were in another tile."""
        layout = self.plgpu.Layout.WGMMA
        column = self.plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout) + start
        seen = (column >= fresh) & (column < length)
        if self.tokens > 1:
            of_row = self.plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout) + row
            for n in range(1, self.tokens):
                # Those before token n do not see the last N - n slots.
                seen &= (of_row >= n * self.each) | (column < length - (self.tokens - n))
        if there is None:
            return seen
        return seen & (lax.broadcast_in_dim(there[...], shape, [1]) > 0)

    def unified(self, stream: Callable[..., Any], into: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Sums of values and of powers, and how far the scores were from the middle of the interval."""

        def step(x: Any, seen: Any, v_tile: Any, carry: Any) -> Any:
            total, away = carry
            distance = jnp.where(seen, jnp.abs(x - self.within.middle), 0.0)
            powers = jnp.where(seen, jnp.exp2(x * LOG2E - self.within.phi * LOG2E), 0.0)
            self.plgpu.wgmma(into, powers.astype(self.q.dtype), v_tile)
            self.plgpu.wgmma_wait(0)
            return total + jnp.sum(powers, axis=1), jnp.maximum(away, jnp.max(distance, axis=1))

        total, away = stream(step, (self.zeros(), self.zeros()))
        return into[...], total, away

    def running(self, x: Any, seen: Any, v_tile: Any, carry: Any) -> Any:
        """Adds a tile after what came before is scaled by the new maximum, which is held times log2 e."""
        summed, total, top = carry
        x = jnp.where(seen, x * LOG2E, -math.inf)
        new = jnp.maximum(top, jnp.max(x, axis=1))
        safe = jnp.where(new > -math.inf, new, 0.0)
        scaled = jnp.exp2(top - safe)
        powers = jnp.exp2(x - lax.broadcast_in_dim(safe, x.shape, [0]))

        def scoped(into: Any) -> jax.Array:
            self.plgpu.wgmma(into, powers.astype(self.q.dtype), v_tile)
            return into[...]

        added = pl.run_scoped(scoped, self.plgpu.ACC(summed.shape, jnp.float32))
        summed = summed * lax.broadcast_in_dim(scaled, summed.shape, [0]) + added
        return summed, total * scaled + jnp.sum(powers, axis=1), new
