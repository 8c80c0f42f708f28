"""Attention over blocks by Mosaic TPU: a program fetches the pieces that its block of queries reads.

    grid (batch, heads that read alike, query blocks)    tiles one after the other, as many as there are

Keys and values lie side by side, all resolutions one behind the other, `[B, G, S', D + E]`, and one copy
fetches a block of a level. Pieces of one level make up a tile of always as many rows: 4 blocks of 128 keys,
8 of means of two, 32 of means of eight. So products are never small, and a tile's copies are waited for at
once, as they have as many bytes at every level. The next tiles come while one is computed.

Tiles of scores are `[keys, queries]`: maxima and sums are then of registers, not of lanes. The query heads
that read the same blocks are queries of one tile.

XLA sorts the blocks by their levels, and makes a list of tiles for each program, which comes to scalar memory
as a block: of a long video the lists of all programs together would not fit there.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse_attention import cost
from pallas_kernels.block_sparse_attention.pyramid import resolutions
from pallas_kernels.blocks import blocks
from pallas_kernels.grids import copies
from pallas_kernels.op import Interpret, Unsupported
from pallas_kernels.padding import padded, rounded

# Rows of a tile, and tiles in memory: one is computed, the others are under way. A power of two.
BLOCKS = {"rows": 1024, "slots": 4}
# Of fewer keys at several levels a program has few blocks of each, which fill half as large a tile better.
MANY_KEYS = 2**15
DTYPES = ("bfloat16", "float32")
LANES, PIECE = 128, 8
LARGEST_HEAD = 256
VECTOR_MEMORY = 32 * 2**20
# Of a tile there is in the list: its level, its first block, its rows, and keys of the last row.
LEVEL, FIRST, ROWS, LAST = range(4)


def forward(
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
    shares: tuple[float, ...] | None = None,
    interpret: Interpret,
) -> jax.Array:
    """As the reference."""
    plan = _Plan(q, k, v, levels, depth, queries, keys, scale, causal)
    if not interpret:
        plan.check(q)
    batch, length, heads, size = q.shape
    lists, values = levels.shape[1], v.shape[-1]
    rows = padded(q.swapaxes(1, 2), 2, queries)  # [B, H, N', D]
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, 0), (0, plan.wide - size)))
    rows = rows.reshape(batch, lists, plan.alike, -1, plan.wide)  # [B, L, R, N', D]
    pyramid = plan.pyramid(k, v)  # [B, G, S', D + E]
    table = plan.table(levels)  # [B, L, I, 1, W]
    own = lambda b, h, i: (b, h, 0, i, 0)  # noqa: E731
    rows_read = batch * lists * levels.shape[2] * cost.rows(plan.places, shares)
    out = pl.pallas_call(
        plan.body,
        grid=(batch, lists, levels.shape[2]),
        in_specs=[
            pl.BlockSpec(
                (None, None, None, 1, table.shape[-1]),
                lambda b, h, i: (b, h, i, 0, 0),
                memory_space=pltpu.SMEM,
            ),
            pl.BlockSpec((None, None, plan.alike, queries, plan.wide), own),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=pl.BlockSpec((None, None, plan.alike, queries, plan.given), own),
        out_shape=jax.ShapeDtypeStruct((*rows.shape[:4], plan.given), q.dtype),
        scratch_shapes=[
            pltpu.VMEM((plan.slots, plan.rows, pyramid.shape[-1]), q.dtype),
            pltpu.VMEM((1, plan.alike * queries), jnp.float32),
            pltpu.VMEM((1, plan.alike * queries), jnp.float32),
            pltpu.VMEM((plan.given, plan.alike * queries), jnp.float32),
            pltpu.SemaphoreType.DMA((plan.slots,)),
        ],
        name="block_sparse_attention",
        metadata=copies(round(rows_read * pyramid.shape[-1] * q.dtype.itemsize)),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel"),
            vmem_limit_bytes=VECTOR_MEMORY,
            # Blocks are numbered above, and there are all of them: checks take as long as small copies.
            disable_bounds_checks=True,
        ),
        cost_estimate=dataclasses.replace(
            cost.forward(q, k, v, levels, shares=shares),
            bytes_accessed=sum(array.size * array.dtype.itemsize for array in (rows, pyramid, table))
            + rows.size // plan.wide * plan.given * q.dtype.itemsize,
        ),
        interpret=interpret,
    )(table, rows, pyramid)
    out = out.reshape(batch, heads, -1, plan.given)[:, :, :length, plan.given - values :]
    return out.swapaxes(1, 2)


class _Plan:
    """How keys lie in memory, and what is done with a tile of them.

    Attributes:
      alike: query heads of a program, which read the same blocks.
      each: lists of blocks for a head of keys.
      places: keys, filled up to whole blocks.
      number: blocks of keys.
      sides: rows of a block at each level.
      starts: the first row of each level.
      pieces: blocks of a tile at each level.
      rows: of a tile.
      most: tiles of a program at most.
      wide: channels of queries; those of keys and values together, where they are not cut apart.
      given: channels of what comes out, of which the last are the values'.
    """

    def __init__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        levels: jax.Array,
        depth: int,
        queries: int,
        keys: int,
        scale: float,
        causal: bool,
    ):
        self.length, self.size = k.shape[1], k.shape[-1]
        self.depth, self.queries, self.keys = depth, queries, keys
        self.scale, self.causal = scale, causal
        self.offset = k.shape[1] - q.shape[1]
        self.alike, self.each = q.shape[2] // levels.shape[1], levels.shape[1] // k.shape[2]
        self.number = -(-self.length // keys)
        self.places = self.number * keys
        chosen = blocks("block_sparse_attention", f"d{self.size}", BLOCKS)
        rows = chosen["rows"] if depth == 1 or self.places >= MANY_KEYS else chosen["rows"] // 2
        self.rows, self.slots = keys * min(max(rows // keys, 1), self.number), chosen["slots"]
        self.sides = [keys >> level for level in range(depth)]
        self.starts = [sum(self.number * side for side in self.sides[:level]) for level in range(depth)]
        self.pieces = [self.rows // side for side in self.sides]
        self.most = -(-self.number // self.pieces[0]) + depth - 1
        # Lanes are cut where registers end. Else a product with zeros leaves the values out, and what comes
        # out has the sums of the keys too, which nobody reads.
        self.apart = self.size % LANES == 0 and v.shape[-1] % LANES == 0
        both = rounded(self.size + v.shape[-1], LANES)
        self.fill = both - self.size - v.shape[-1]
        self.wide, self.given = (self.size, v.shape[-1]) if self.apart else (both, both)
        self.exact = q.dtype == jnp.float32

    def check(self, q: jax.Array) -> None:
        """Raises where Mosaic would."""
        if q.dtype.name not in DTYPES:
            raise Unsupported(f"block_sparse_attention on TPU takes {' or '.join(DTYPES)}, not {q.dtype}.")
        if self.wide > LARGEST_HEAD or self.given > LARGEST_HEAD:
            raise Unsupported(
                f"block_sparse_attention on TPU takes heads of up to {LARGEST_HEAD} channels, keys and values"
                f" together where they are no multiples of {LANES}, not {self.wide} and {self.given}."
            )
        if self.sides[-1] % PIECE or self.queries % (2 * PIECE):
            raise Unsupported(
                f"block_sparse_attention on TPU takes blocks of keys of a multiple of {PIECE} rows at the"
                f" last level and of queries of a multiple of {2 * PIECE}, not {self.sides[-1]} and"
                f" {self.queries}."
            )

    def pyramid(self, k: jax.Array, v: jax.Array) -> jax.Array:
        """`[B, G, S', D + E]`: all levels one behind the other."""
        both = jnp.concatenate([k, jnp.zeros((*k.shape[:3], self.fill), k.dtype), v], axis=-1)
        return jnp.concatenate(resolutions(both.swapaxes(1, 2), 2, self.depth, self.keys), axis=2)

    def table(self, levels: jax.Array) -> jax.Array:
        """`[B, L, I, 1, W]`: minus the tiles that are missing, the tiles, and the blocks in their order.

        Minus, as libtpu's profiler puts positive numbers where it knows none: to it no tile is missing.
        """
        above = levels.shape[:-1]
        levels = levels.reshape(-1, self.number)  # [R, J]
        order = jnp.argsort(jnp.where(levels > 0, levels, self.depth + 1), axis=1, stable=True)  # [R, J]
        count = jnp.stack([jnp.sum(levels == level + 1, 1) for level in range(self.depth)], 1)  # [R, L]
        pieces, sides = (jnp.asarray(found, jnp.int32)[None] for found in (self.pieces, self.sides))  # [1, L]
        tiles = (count + pieces - 1) // pieces  # [R, L]
        stop = jnp.cumsum(tiles, 1)
        tile = jnp.arange(self.most)[None]  # [1, T]
        level = jnp.sum(tile[:, :, None] >= stop[:, None], 2)
        level = jnp.minimum(level, self.depth - 1)  # [R, T]
        chosen = level[:, :, None] == jnp.arange(self.depth)[None, None]  # [R, T, L]

        def of_level(array: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(chosen, array[:, None], 0), 2)  # [R, T]

        each, side, whole = of_level(pieces), of_level(sides), of_level(count)
        before = (tile - of_level(stop - tiles)) * each  # blocks of the level in tiles before
        here = jnp.clip(whole - before, 0, each)
        # The last block of all stands behind the others of its level, and may have fewer rows and keys.
        left = self.length - (self.number - 1) * self.keys
        ends = (levels[:, -1:] == level + 1) & (before + here == whole)
        means = jnp.left_shift(1, level)
        of_last = (left + means - 1) // means
        rows = here * side - jnp.where(ends, side - of_last, 0)
        last = jnp.where(ends, left - (of_last - 1) * means, means)
        first = of_level(jnp.cumsum(count, 1) - count) + before
        parts = [
            stop[:, -1:] - self.most,
            jnp.stack([level, first, rows, last], 2).reshape(-1, 4 * self.most),
            # What a tile that is not full fetches besides.
            jnp.pad(order, ((0, 0), (0, self.pieces[-1]))),
        ]
        found = padded(jnp.concatenate(parts, 1).astype(jnp.int32), 1, LANES)
        return found.reshape(*above, 1, -1)

    def body(self, table: Any, q: Any, pyramid: Any, out: Any, *scratch: Any) -> None:
        held, top, total, summed, arrived = scratch
        b, h, i = (pl.program_id(axis) for axis in range(3))
        g = lax.div(h, self.each)
        count = jnp.minimum(self.most + table[0, 0], self.most)

        def told(tile: Any, what: int) -> Any:
            return table[0, 1 + 4 * tile + what]

        def numbered(tile: Any, piece: int) -> Any:
            return table[0, 1 + 4 * self.most + told(tile, FIRST) + piece]

        def start(tile: Any) -> None:
            slot = tile & (self.slots - 1)
            for level, (side, begin) in enumerate(zip(self.sides, self.starts, strict=True)):
                here = told(tile, LEVEL) == level if level < self.depth - 1 else told(tile, LEVEL) >= level

                @pl.when(here)
                def _(level: int = level, side: int = side, begin: int = begin) -> None:
                    for piece in range(self.pieces[level]):
                        row = pl.multiple_of(begin + numbered(tile, piece) * side, math.gcd(side, begin))
                        there, into = pl.ds(row, side), pl.ds(piece * side, side)
                        copy = pyramid.at[b, g, there], held.at[slot, into], arrived.at[slot]
                        pltpu.make_async_copy(*copy).start()

        def step(tile: Any, _: None) -> None:
            @pl.when(tile + self.slots - 1 < count)
            def _() -> None:
                start(tile + self.slots - 1)

            slot = tile & (self.slots - 1)
            # One wait for as many bytes as all copies of a tile have.
            as_many = pyramid.at[b, g, pl.ds(0, self.rows)]
            pltpu.make_async_copy(as_many, held.at[slot], arrived.at[slot]).wait()
            k, v = held[slot], held[slot]
            if self.apart:
                k, v = k[:, : self.size], v[:, self.size :]
            x = self.dot(k, q[...].reshape(-1, self.wide), 1) * self.scale  # [rows, R queries]
            x = self.weighed(x, told(tile, LEVEL), told(tile, ROWS), told(tile, LAST))
            if self.causal:
                x = self.unseen(x, i, told(tile, LEVEL), lambda piece: numbered(tile, piece))
            old = top[...]  # [1, R queries]
            new = jnp.maximum(old, jnp.max(x, axis=0, keepdims=True))
            # Until a query has seen something its maximum is no number to subtract.
            base = jnp.where(new > -math.inf, new, 0.0)
            powers, scaled = jnp.exp(x - base), jnp.exp(old - base)
            top[...] = new
            total[...] = total[...] * scaled + jnp.sum(powers, axis=0, keepdims=True)
            summed[...] = summed[...] * scaled + self.dot(v, powers.astype(v.dtype), 0)  # [E, R queries]

        top[...] = jnp.full_like(top, -math.inf)
        total[...] = jnp.zeros_like(total)
        summed[...] = jnp.zeros_like(summed)

        lax.fori_loop(0, jnp.minimum(count, self.slots - 1), lambda tile, _: start(tile), None)
        lax.fori_loop(0, count, step, None)
        y = summed[...] / jnp.where(total[...] > 0, total[...], 1.0)  # [E, R queries]
        out[...] = y.T.reshape(out.shape).astype(out.dtype)

    def weighed(self, x: jax.Array, level: Any, rows: Any, last: Any) -> jax.Array:
        """Scores, with the logarithm of how many keys a row stands for; -inf for rows that are no tile's."""
        row = lax.broadcasted_iota(jnp.int32, x.shape, 0)
        of_last = jnp.log(jnp.full((1, x.shape[1]), last, jnp.int32).astype(jnp.float32))
        bias = jnp.where(row == rows - 1, of_last, math.log(2) * level.astype(jnp.float32))
        return jnp.where(row < rows, x + bias, -math.inf)

    def unseen(self, x: jax.Array, i: Any, level: Any, numbered: Any) -> jax.Array:
        """Scores, -inf where a key is later than the query; only at the first level there are such keys."""
        column = lax.broadcasted_iota(jnp.int32, (1, x.shape[1]), 1)
        stands_at = lax.rem(column, jnp.int32(self.queries)) + (i * self.queries + self.offset)
        stands_at += jnp.where(level == 0, 0, self.places)
        parts = []
        for piece in range(self.pieces[0]):
            part = x[piece * self.keys : (piece + 1) * self.keys]
            place = lax.broadcasted_iota(jnp.int32, part.shape, 0)
            parts.append(jnp.where(place <= stands_at - numbered(piece) * self.keys, part, -math.inf))
        return jnp.concatenate(parts, axis=0)

    def dot(self, a: jax.Array, b: jax.Array, over: int) -> jax.Array:
        """a b^T in float32, or a^T b where it is summed over the first sides."""
        return lax.dot_general(
            *(a, b),
            (((over,), (over,)), ((), ())),
            precision=lax.Precision.HIGHEST if self.exact else lax.Precision.DEFAULT,
            preferred_element_type=jnp.float32,
        )
