"""Sigmoid attention by Mosaic TPU: tiles of the logits stay in vector memory.

A tile needs no other: there is no maximum, no sum of a row, and nothing is scaled again.

    forward    grid (batch, head, queries, keys)     o  += sigmoid(s) v
    d queries  grid (batch, head, queries, keys)     dq += ds k
    d keys     grid (batch, group, keys, head of the group, queries)    dv += p^T do, dk += ds^T q

The last kernel makes its tiles transposed, s^T = k q^T, so that no tile is turned. Arrays come with heads
before places, `[B, H, N, D]`. Narrow heads that share no keys come as they are, `[B, N, H D]`, and a program
has as many of them as fill the lanes: nothing is turned around the kernels, and no lane is empty.

A length of one block is the block. Longer ones are filled up to whole blocks: what is added has values of
zero, which add nothing.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blocks import blocks
from pallas_kernels.op import Interpret, Unsupported
from pallas_kernels.padding import padded
from pallas_kernels.sigmoid_attention import cost

# Queries and keys of a tile. 512 by 512 logits are 1 MB in float32, of which a pass holds two to four.
BLOCKS = {"queries": 512, "keys": 512}
DTYPES = ("bfloat16", "float32")
LARGEST_HEAD = 256
LANES = 128
# Of the 64 MiB of a v7x core or v5p some is taken; others have 128.
VECTOR_MEMORY = 32 * 2**20
# The logit of a key that a query does not see: its weight is 0.
NEVER = -1e30


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None = None,
    *,
    scale: float,
    bias: float,
    causal: bool,
    interpret: Interpret,
) -> jax.Array:
    """As the reference."""
    tiles = _Tiles(q, k, v, segments, causal, scale, bias)
    size, values = q.shape[-1], v.shape[-1]
    out = pl.pallas_call(
        functools.partial(_forward, tiles=tiles),
        grid=(*tiles.heads, tiles.query_blocks, tiles.key_blocks),
        in_specs=[tiles.of_queries(size), tiles.of_keys(size), tiles.of_keys(values), *tiles.of_segments()],
        out_specs=tiles.of_queries(values),
        out_shape=tiles.shape(tiles.q, values),
        scratch_shapes=[tiles.sums(tiles.queries, values)],
        name="sigmoid_attention",
        compiler_params=_compiler("parallel", "parallel", "parallel", "arbitrary"),
        cost_estimate=cost.forward(q, k, v, causal=causal),
        interpret=interpret,
    )(tiles.q, tiles.k, tiles.v, *tiles.segments)
    return tiles.restored(out, q.shape[1], values)


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    cotangent: jax.Array,
    *,
    scale: float,
    bias: float,
    causal: bool,
    interpret: Interpret,
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    """Cotangents of queries, keys and values."""
    tiles = _Tiles(q, k, v, segments, causal, scale, bias)
    size, values = q.shape[-1], v.shape[-1]
    out = tiles.arranged(cotangent, tiles.queries)
    of_queries, of_keys, of_values = tiles.of_queries(size), tiles.of_keys(size), tiles.of_keys(values)
    d_q = pl.pallas_call(
        functools.partial(_backward_queries, tiles=tiles),
        grid=(*tiles.heads, tiles.query_blocks, tiles.key_blocks),
        in_specs=[of_queries, of_keys, of_values, tiles.of_queries(values), *tiles.of_segments()],
        out_specs=of_queries,
        out_shape=jax.ShapeDtypeStruct(tiles.q.shape, q.dtype),
        scratch_shapes=[tiles.sums(tiles.queries, size)],
        name="sigmoid_attention_backward_queries",
        compiler_params=_compiler("parallel", "parallel", "parallel", "arbitrary"),
        cost_estimate=cost.backward_queries(q, k, v, causal=causal),
        interpret=interpret,
    )(tiles.q, tiles.k, tiles.v, out, *tiles.segments)
    d_k, d_v = pl.pallas_call(
        functools.partial(_backward_keys, tiles=tiles),
        grid=(*tiles.groups, tiles.key_blocks, tiles.group, tiles.query_blocks),
        in_specs=[
            tiles.of_queries_by_group(size),
            tiles.of_keys_by_group(size),
            tiles.of_keys_by_group(values),
            tiles.of_queries_by_group(values),
            *tiles.of_segments_by_group(),
        ],
        out_specs=[tiles.of_keys_by_group(size), tiles.of_keys_by_group(values)],
        out_shape=[tiles.shape(tiles.k, last) for last in (size, values)],
        scratch_shapes=[tiles.sums(tiles.keys, last) for last in (size, values)],
        name="sigmoid_attention_backward_keys",
        compiler_params=_compiler("parallel", "parallel", "parallel", "arbitrary", "arbitrary"),
        cost_estimate=cost.backward_keys(q, k, v, causal=causal),
        interpret=interpret,
    )(tiles.q, tiles.k, tiles.v, out, *tiles.segments)
    return (
        tiles.restored(d_q, q.shape[1], size),
        tiles.restored(d_k, k.shape[1], size),
        tiles.restored(d_v, k.shape[1], values),
        None,
    )


class _Tiles:
    """How the arrays are cut, and which tiles a query sees any of.

    Attributes:
      q: `[B, H, N', D]`, or `[B, N', H D]` of heads side by side.
      k: `[B, G, S', D]`, likewise.
      v: `[B, G, S', E]`, likewise.
      beside: heads of a program, side by side; 1 where heads come first.
      parts: the channels of each of them.
      segments: those of the rows of a tile `[B, N', 1]` and of its columns `[B, 1, N']`, where there are any.
      queries: of a tile.
      keys: of a tile.
    """

    def __init__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        segments: jax.Array | None,
        causal: bool,
        scale: float,
        bias: float,
    ):
        if q.dtype.name not in DTYPES:
            raise Unsupported(f"sigmoid_attention on TPU takes {' or '.join(DTYPES)}, not {q.dtype}.")
        if max(q.shape[-1], v.shape[-1]) > LARGEST_HEAD:
            raise Unsupported(
                f"sigmoid_attention on TPU takes heads of up to {LARGEST_HEAD} channels, not"
                f" {max(q.shape[-1], v.shape[-1])}."
            )
        chosen = blocks("sigmoid_attention", f"d{q.shape[-1]}", BLOCKS)
        self.causal, self.scale, self.bias = causal, scale, bias
        self.queries = min(chosen["queries"], q.shape[1])
        self.keys = min(chosen["keys"], k.shape[1])
        self.group = q.shape[2] // k.shape[2]
        # How far the first query stands behind the first key.
        self.offset = k.shape[1] - q.shape[1]
        self.size = q.shape[-1]
        fill = LANES // self.size
        narrow = fill > 1 and LANES % self.size == 0 and self.size == v.shape[-1]
        self.beside = fill if narrow and self.group == 1 and q.shape[2] % fill == 0 else 1
        self.parts = [slice(part * self.size, (part + 1) * self.size) for part in range(self.beside)]
        if self.beside == 1:
            self.parts = [slice(None)]
        self.heads, self.groups = ((x.shape[0], x.shape[2] // self.beside) for x in (q, k))
        self.q = self.arranged(q, self.queries)
        self.k, self.v = (self.arranged(x, self.keys) for x in (k, v))
        self.segments: list[jax.Array] = []
        if segments is not None:
            whole = padded(segments, 1, math.lcm(self.queries, self.keys))
            self.segments = [whole[:, :, None], whole[:, None, :]]
        self.query_blocks = self.q.shape[-2] // self.queries
        self.key_blocks = self.k.shape[-2] // self.keys
        self.precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else lax.Precision.DEFAULT

    def arranged(self, array: jax.Array, rows: int) -> jax.Array:
        """`[B, N, H, D]` as it is cut, its places filled up to whole blocks of rows."""
        if self.beside > 1:
            return padded(array.reshape(*array.shape[:2], -1), 1, rows)
        return padded(array.swapaxes(1, 2), 2, rows)

    def restored(self, array: jax.Array, length: int, last: int) -> jax.Array:
        """`[B, length, H, last]` of what is arranged."""
        if self.beside > 1:
            return array[:, :length].reshape(array.shape[0], length, -1, last)
        return array[:, :, :length].swapaxes(1, 2)

    def shape(self, array: jax.Array, last: int) -> jax.ShapeDtypeStruct:
        """An arranged array of the places and heads of another one, and of `last` channels a head."""
        channels = array.shape[-1] // self.size * last
        return jax.ShapeDtypeStruct((*array.shape[:-1], channels), array.dtype)

    def sums(self, rows: int, last: int) -> Any:
        """Scratch memory of a tile."""
        return pltpu.VMEM((rows, self.beside * last), jnp.float32)

    def spec(self, rows: int, last: int, index: Callable[..., tuple[Any, Any, Any]]) -> pl.BlockSpec:
        """Blocks of an arranged array; `index` tells the row of the batch, head and block of places."""

        def turned(*program: Any) -> tuple[Any, ...]:
            row, head, block = index(*program)
            return row, block, head

        if self.beside > 1:
            return pl.BlockSpec((None, rows, self.beside * last), turned)
        return pl.BlockSpec((None, None, rows, last), lambda *program: (*index(*program), 0))

    def of_queries(self, last: int) -> pl.BlockSpec:
        return self.spec(self.queries, last, lambda b, h, i, j: (b, h, i))

    def of_keys(self, last: int) -> pl.BlockSpec:
        return self.spec(self.keys, last, lambda b, h, i, j: (b, lax.div(h, self.group), self.seen(i, j)))

    def of_queries_by_group(self, last: int) -> pl.BlockSpec:
        return self.spec(self.queries, last, lambda b, g, j, r, i: (b, g * self.group + r, self.seeing(i, j)))

    def of_keys_by_group(self, last: int) -> pl.BlockSpec:
        return self.spec(self.keys, last, lambda b, g, j, r, i: (b, g, j))

    def of_segments(self) -> list[pl.BlockSpec]:
        """Of tiles `[queries, keys]`."""
        if not self.segments:
            return []
        return [
            pl.BlockSpec((None, self.queries, 1), lambda b, h, i, j: (b, i, 0)),
            pl.BlockSpec((None, 1, self.keys), lambda b, h, i, j: (b, 0, self.seen(i, j))),
        ]

    def of_segments_by_group(self) -> list[pl.BlockSpec]:
        """Of tiles `[keys, queries]`."""
        if not self.segments:
            return []
        return [
            pl.BlockSpec((None, self.keys, 1), lambda b, g, j, r, i: (b, j, 0)),
            pl.BlockSpec((None, 1, self.queries), lambda b, g, j, r, i: (b, 0, self.seeing(i, j))),
        ]

    def seen(self, i: Any, j: Any) -> Any:
        """Block `j` of keys; where no query of block `i` sees any of it, the last one that some see."""
        return jnp.minimum(j, self.last_keys(i)) if self.causal else j

    def seeing(self, i: Any, j: Any) -> Any:
        """Block `i` of queries, or where none of them sees a key of block `j` the first that does."""
        return jnp.maximum(i, self.first_queries(j)) if self.causal else i

    def last_keys(self, i: Any) -> Any:
        """The last block of keys of which queries of block `i` see any, the first one where they see none."""
        last = lax.div(jnp.maximum((i + 1) * self.queries - 1 + self.offset, 0), self.keys)
        return jnp.minimum(last, self.key_blocks - 1)

    def first_queries(self, j: Any) -> Any:
        """The first block of queries of which some see keys of block `j`, the last one where none do."""
        first = lax.div(jnp.maximum(j * self.keys - self.offset, 0), self.queries)
        return jnp.minimum(first, self.query_blocks - 1)

    def sees(self, i: Any, j: Any) -> Any:
        """Whether some query of block `i` sees some key of block `j`."""
        return (i + 1) * self.queries - 1 + self.offset >= j * self.keys

    def run(self, tile: Callable[[bool], None], i: Any, j: Any) -> None:
        """Runs what is done for a tile, where it is seen; it is told whether a key may come too late."""
        if not self.causal:
            tile(False)
            return
        first, last = i * self.queries + self.offset, (j + 1) * self.keys - 1
        all_of_it = first >= last
        pl.when(all_of_it)(lambda: tile(False))
        pl.when(self.sees(i, j) & jnp.logical_not(all_of_it))(lambda: tile(True))

    def weights(
        self, logits: jax.Array, i: Any, j: Any, causal: bool, segments: Any, queries_axis: int = 0
    ) -> jax.Array:
        """Sigmoid of a tile of products of queries and keys, 0 where a key is not seen."""
        x = logits * self.scale + self.bias
        if causal:
            row = lax.broadcasted_iota(jnp.int32, x.shape, queries_axis) + (i * self.queries + self.offset)
            column = lax.broadcasted_iota(jnp.int32, x.shape, 1 - queries_axis) + j * self.keys
            x = jnp.where(row >= column, x, NEVER)
        if segments:
            of_rows, of_columns = segments
            x = jnp.where(of_rows[...] == of_columns[...], x, NEVER)
        return jax.nn.sigmoid(x)

    def dot(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """a b in float32."""
        return jnp.dot(a, b, precision=self.precision, preferred_element_type=jnp.float32)

    def dot_t(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """a b^T in float32."""
        axes = (((1,), (1,)), ((), ()))
        return lax.dot_general(a, b, axes, precision=self.precision, preferred_element_type=jnp.float32)


def _compiler(*semantics: Literal["parallel", "arbitrary"]) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VECTOR_MEMORY)


def _accumulate(
    first: Any, last: Any, tile: Any, sums: list[Any], outputs: list[Any], factors: list[float]
) -> None:
    """Adds up tiles in scratch memory; the sums are written out with the last one."""

    @pl.when(first)
    def _() -> None:
        for total in sums:
            total[...] = jnp.zeros_like(total)

    tile()

    @pl.when(last)
    def _() -> None:
        for total, out, factor in zip(sums, outputs, factors, strict=True):
            out[...] = (total[...] * factor).astype(out.dtype)


def _forward(q: Any, k: Any, v: Any, *others: Any, tiles: _Tiles) -> None:
    *segments, out, total = others
    i, j = pl.program_id(2), pl.program_id(3)

    def tile(causal: bool) -> None:
        for part in tiles.parts:
            logits = tiles.dot_t(q[:, part], k[:, part])
            p = tiles.weights(logits, i, j, causal, segments)  # [queries, keys]
            total[:, part] += tiles.dot(p.astype(v.dtype), v[:, part])  # [queries, E]

    _accumulate(j == 0, j == tiles.key_blocks - 1, lambda: tiles.run(tile, i, j), [total], [out], [1.0])


def _backward_queries(q: Any, k: Any, v: Any, do: Any, *others: Any, tiles: _Tiles) -> None:
    *segments, d_q, total = others
    i, j = pl.program_id(2), pl.program_id(3)

    def tile(causal: bool) -> None:
        for part in tiles.parts:
            logits = tiles.dot_t(q[:, part], k[:, part])
            p = tiles.weights(logits, i, j, causal, segments)  # [queries, keys]
            d_s = tiles.dot_t(do[:, part], v[:, part]) * p * (1 - p)
            total[:, part] += tiles.dot(d_s.astype(k.dtype), k[:, part])  # [queries, D]

    _accumulate(
        j == 0, j == tiles.key_blocks - 1, lambda: tiles.run(tile, i, j), [total], [d_q], [tiles.scale]
    )


def _backward_keys(q: Any, k: Any, v: Any, do: Any, *others: Any, tiles: _Tiles) -> None:
    *segments, d_k, d_v, sum_k, sum_v = others
    j, r, i = pl.program_id(2), pl.program_id(3), pl.program_id(4)

    def tile(causal: bool) -> None:
        for part in tiles.parts:
            logits = tiles.dot_t(k[:, part], q[:, part])
            p = tiles.weights(logits, i, j, causal, segments, 1)  # [keys, queries]
            sum_v[:, part] += tiles.dot(p.astype(do.dtype), do[:, part])  # [keys, E]
            d_s = tiles.dot_t(v[:, part], do[:, part]) * p * (1 - p)
            sum_k[:, part] += tiles.dot(d_s.astype(q.dtype), q[:, part])  # [keys, D]

    first = (r == 0) & (i == 0)
    last = (r == tiles.group - 1) & (i == tiles.query_blocks - 1)
    _accumulate(first, last, lambda: tiles.run(tile, i, j), [sum_k, sum_v], [d_k, d_v], [tiles.scale, 1.0])
