"""Sigmoid attention by Mosaic GPU for Hopper: tiles by TMA, products by wgmma, logits in registers.

One warpgroup has one tile of queries (forward, d queries) or of keys (d keys), and the others come by in a
pipeline. The weights go from registers into the second product: they are never in shared memory.

The weight is 1 / (1 + 2^(-x log2 e)). The form 0.5 + 0.5 tanh(x / 2) takes one instruction less, and is of no
use here: `tanh.approx.f32` errs by 2^-11 of its result, which stands beside 1, so by up to 2.4e-4 in a weight
that is 1/n = 2.4e-4 itself at n = 4096.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import versions
from pallas_kernels.blocks import blocks
from pallas_kernels.emulate import emulated
from pallas_kernels.op import Interpret, Unsupported
from pallas_kernels.padding import padded
from pallas_kernels.sigmoid_attention import cost

# Queries and keys of a tile and tiles of each that are under way at a time.
BLOCKS = {"queries": 64, "keys": 64, "stages": 2, "backward_queries": 64, "backward_keys": 64}
DTYPES = ("bfloat16", "float16")
LARGEST_HEAD = 128
# Channels that stand side by side in shared memory: 128 bytes.
UNIT = 64


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
    plgpu = versions.mosaic_gpu()
    tiles = _Tiles(q, k, v, segments, causal, scale, bias, interpret)
    batch, queries, heads, size = tiles.q.shape
    values = tiles.v.shape[-1]

    def body(q_all: Any, k_all: Any, v_all: Any, *others: Any) -> None:
        segments, out_all, q_tile, out_tile, of_rows, arrived = tiles.named(others, 3)
        i, h, b = (lax.axis_index(axis) for axis in ("queries", "head", "batch"))
        g, rows = lax.div(h, tiles.group), pl.ds(i * tiles.queries, tiles.queries)
        plgpu.copy_gmem_to_smem(q_all.at[b, rows, h], q_tile, arrived)
        tiles.fetch_segments(segments, b, rows, of_rows, arrived)
        plgpu.barrier_wait(arrived)

        def scoped(total: Any) -> jax.Array:
            def step(place: Any, k_tile: Any, v_tile: Any, *of_columns: Any) -> None:
                p = tiles.weights(tiles.product(q_tile, k_tile), i, place[0], of_rows, of_columns)
                plgpu.wgmma(total, p.astype(q.dtype), v_tile)
                plgpu.wgmma_wait(0)

            of_keys = tiles.stream(step, tiles.seen_keys(i), tiles.keys, [size, values])
            of_keys(k_all.at[b, :, g], v_all.at[b, :, g], *(one.at[b] for one in segments))
            return total[...]

        tiles.write(scoped, (tiles.queries, values), 1.0, out_tile, out_all.at[b, rows, h])

    out = tiles.kernel(
        body,
        out=jax.ShapeDtypeStruct((batch, queries, heads, values), q.dtype),
        scratch=tiles.scratch(tiles.queries, size, values, copies=1),
        grid=(queries // tiles.queries, heads, batch),
        axes=("queries", "head", "batch"),
        name="sigmoid_attention",
        cost=cost.forward(q, k, v, causal=causal),
    )(tiles.q, tiles.k, tiles.v, *tiles.segments)
    return out[:, : q.shape[1], :, : v.shape[-1]]


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
    tiles = _Tiles(q, k, v, segments, causal, scale, bias, interpret, backward=True)
    out = padded(padded(cotangent, 1, tiles.queries), 3, UNIT)  # [B, N', H, E']
    d_q = _backward_queries(tiles, out, cost.backward_queries(q, k, v, causal=causal))
    d_k, d_v = _backward_keys(tiles, out, cost.backward_keys(q, k, v, causal=causal))
    return (
        d_q[:, : q.shape[1], :, : q.shape[-1]],
        d_k[:, : k.shape[1], :, : k.shape[-1]],
        d_v[:, : v.shape[1], :, : v.shape[-1]],
        None,
    )


def _backward_queries(tiles: "_Tiles", out: jax.Array, estimate: pl.CostEstimate) -> jax.Array:
    plgpu = versions.mosaic_gpu()
    batch, queries, heads, size = tiles.q.shape
    values = tiles.v.shape[-1]

    def body(q_all: Any, k_all: Any, v_all: Any, do_all: Any, *others: Any) -> None:
        segments, d_all, q_tile, do_tile, of_rows, arrived = tiles.named(others, 3)
        i, h, b = (lax.axis_index(axis) for axis in ("queries", "head", "batch"))
        g, rows = lax.div(h, tiles.group), pl.ds(i * tiles.queries, tiles.queries)
        plgpu.copy_gmem_to_smem(q_all.at[b, rows, h], q_tile, arrived)
        plgpu.copy_gmem_to_smem(do_all.at[b, rows, h], do_tile, arrived)
        tiles.fetch_segments(segments, b, rows, of_rows, arrived)
        plgpu.barrier_wait(arrived)

        def scoped(total: Any) -> jax.Array:
            def step(place: Any, k_tile: Any, v_tile: Any, *of_columns: Any) -> None:
                p = tiles.weights(tiles.product(q_tile, k_tile), i, place[0], of_rows, of_columns)
                d_s = tiles.product(do_tile, v_tile) * p * (1 - p)
                plgpu.wgmma(total, d_s.astype(q_tile.dtype), k_tile)
                plgpu.wgmma_wait(0)

            of_keys = tiles.stream(step, tiles.seen_keys(i), tiles.keys, [size, values])
            of_keys(k_all.at[b, :, g], v_all.at[b, :, g], *(one.at[b] for one in segments))
            return total[...]

        tiles.write(scoped, (tiles.queries, size), tiles.scale, q_tile, d_all.at[b, rows, h])

    return tiles.kernel(
        body,
        out=jax.ShapeDtypeStruct(tiles.q.shape, tiles.q.dtype),
        scratch=tiles.scratch(tiles.queries, size, values, copies=2),
        grid=(queries // tiles.queries, heads, batch),
        axes=("queries", "head", "batch"),
        name="sigmoid_attention_backward_queries",
        cost=estimate,
    )(tiles.q, tiles.k, tiles.v, out, *tiles.segments)


def _backward_keys(tiles: "_Tiles", out: jax.Array, estimate: pl.CostEstimate) -> tuple[jax.Array, jax.Array]:
    plgpu = versions.mosaic_gpu()
    batch, keys, groups, size = tiles.k.shape
    values = tiles.v.shape[-1]

    def body(q_all: Any, k_all: Any, v_all: Any, do_all: Any, *others: Any) -> None:
        segments, d_k_all, d_v_all, k_tile, v_tile, of_rows, arrived = tiles.named(others, 4)
        j, g, b = (lax.axis_index(axis) for axis in ("keys", "group", "batch"))
        rows = pl.ds(j * tiles.keys, tiles.keys)
        plgpu.copy_gmem_to_smem(k_all.at[b, rows, g], k_tile, arrived)
        plgpu.copy_gmem_to_smem(v_all.at[b, rows, g], v_tile, arrived)
        tiles.fetch_segments(segments, b, rows, of_rows, arrived)
        plgpu.barrier_wait(arrived)
        first = tiles.first_queries(j)

        def scoped(sum_k: Any, sum_v: Any) -> tuple[jax.Array, jax.Array]:
            def step(place: Any, q_tile: Any, do_tile: Any, *of_columns: Any) -> None:
                logits = tiles.product(k_tile, q_tile)  # [keys, queries]
                p = tiles.weights(logits, first + place[0], j, of_rows, of_columns, 1)
                plgpu.wgmma(sum_v, p.astype(k_tile.dtype), do_tile)
                d_s = tiles.product(v_tile, do_tile) * p * (1 - p)
                plgpu.wgmma(sum_k, d_s.astype(k_tile.dtype), q_tile)
                plgpu.wgmma_wait(0)

            left = tiles.query_blocks - first
            of_queries = tiles.stream(step, left, tiles.queries, [size, values], first)

            def of_head(r: Any, _: None) -> None:
                h = g * tiles.group + r
                of_queries(q_all.at[b, :, h], do_all.at[b, :, h], *(one.at[b] for one in segments))

            lax.fori_loop(0, tiles.group, of_head, None)
            return sum_k[...], sum_v[...]

        shapes = [plgpu.ACC((tiles.keys, last), jnp.float32) for last in (size, values)]
        d_k, d_v = pl.run_scoped(scoped, *shapes)
        k_tile[...] = (d_k * tiles.scale).astype(k_tile.dtype)
        v_tile[...] = d_v.astype(v_tile.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_tile, d_k_all.at[b, rows, g])
        plgpu.copy_smem_to_gmem(v_tile, d_v_all.at[b, rows, g])
        plgpu.wait_smem_to_gmem(0)

    return tiles.kernel(
        body,
        out=(
            jax.ShapeDtypeStruct(tiles.k.shape, tiles.k.dtype),
            jax.ShapeDtypeStruct(tiles.v.shape, tiles.v.dtype),
        ),
        scratch=tiles.scratch(tiles.keys, size, values, copies=2),
        grid=(keys // tiles.keys, groups, batch),
        axes=("keys", "group", "batch"),
        name="sigmoid_attention_backward_keys",
        cost=estimate,
    )(tiles.q, tiles.k, tiles.v, out, *tiles.segments)


class _Tiles:
    """How the arrays are cut, and what is done with a tile.

    Attributes:
      q: `[B, N', H, D']`.
      k: `[B, S', G, D']`.
      v: `[B, S', G, E']`.
      segments: `[B, N']`, where there are any.
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
        interpret: Interpret,
        backward: bool = False,
    ):
        if q.dtype.name not in DTYPES:
            raise Unsupported(f"sigmoid_attention on GPU takes {' or '.join(DTYPES)}, not {q.dtype}.")
        if max(q.shape[-1], v.shape[-1]) > LARGEST_HEAD:
            raise Unsupported(
                f"sigmoid_attention on GPU takes heads of up to {LARGEST_HEAD} channels, not"
                f" {max(q.shape[-1], v.shape[-1])}."
            )
        chosen = blocks("sigmoid_attention", f"d{q.shape[-1]}", BLOCKS)
        self.causal, self.scale, self.bias, self.interpret = causal, scale, bias, interpret
        self.queries = chosen["backward_queries" if backward else "queries"]
        self.keys = chosen["backward_keys" if backward else "keys"]
        self.stages = chosen["stages"]
        self.group = q.shape[2] // k.shape[2]
        # How far the first query stands behind the first key.
        self.offset = k.shape[1] - q.shape[1]
        self.q = padded(padded(q, 1, self.queries), 3, UNIT)
        self.k, self.v = (padded(padded(x, 1, self.keys), 3, UNIT) for x in (k, v))
        self.segments: list[jax.Array] = []
        if segments is not None:
            self.segments = [padded(segments, 1, math.lcm(self.queries, self.keys))]
        self.query_blocks = self.q.shape[1] // self.queries
        self.key_blocks = self.k.shape[1] // self.keys
        self.plgpu = versions.mosaic_gpu()

    def kernel(
        self, body: Callable[..., None], *, axes: tuple[str, ...], **options: Any
    ) -> Callable[..., Any]:
        made = versions.mosaic_gpu_kernel(body, grid_names=axes, approximate=True, **options)
        return emulated(made) if self.interpret else made

    def scratch(self, rows: int, size: int, values: int, copies: int) -> list[Any]:
        """Tiles of a program's own rows, their segments where there are any, and a barrier for the copies."""
        plgpu = self.plgpu
        tiles = [plgpu.SMEM((rows, last), self.q.dtype) for last in (size, values)]
        of_rows = [plgpu.SMEM((rows,), jnp.int32) for _ in self.segments]
        return [*tiles, *of_rows, plgpu.Barrier(num_arrivals=copies + len(self.segments))]

    def named(self, references: tuple[Any, ...], count: int) -> list[Any]:
        """The other references: segments in a list, outputs and tiles, the rows' segments in a list."""
        n = len(self.segments)
        segments, others = references[:n], references[n:]
        return [segments, *others[:count], others[count:-1], others[-1]]

    def fetch_segments(self, segments: Any, b: Any, rows: Any, of_rows: Any, arrived: Any) -> None:
        """Starts copies of the segments of a program's own rows."""
        for whole, tile in zip(segments, of_rows, strict=True):
            self.plgpu.copy_gmem_to_smem(whole.at[b, rows], tile, arrived)

    def stream(
        self, step: Callable[..., None], count: Any, places: int, channels: list[int], first: Any = 0
    ) -> Callable[..., None]:
        """A pipeline over `count` tiles of `[places, channels]` arrays, and of segments, from a tile on."""
        block = self.plgpu.BlockSpec
        specs = [block((places, last), lambda place: (first + place, 0)) for last in channels]
        specs += [block((places,), lambda place: (first + place,)) for _ in self.segments]
        return self.plgpu.emit_pipeline(step, grid=(count,), in_specs=specs, max_concurrent_steps=self.stages)

    def seen_keys(self, i: Any) -> Any:
        """How many blocks of keys the queries of block `i` see any of."""
        if not self.causal:
            return self.key_blocks
        past = jnp.maximum((i + 1) * self.queries + self.offset, 0)
        return jnp.minimum(lax.div(past + (self.keys - 1), self.keys), self.key_blocks)

    def first_queries(self, j: Any) -> Any:
        """The first block of queries of which some see keys of block `j`; past the last where none do."""
        if not self.causal:
            return 0
        return jnp.minimum(
            lax.div(jnp.maximum(j * self.keys - self.offset, 0), self.queries), self.query_blocks
        )

    def product(self, a: Any, b: Any) -> jax.Array:
        """a b^T in float32 of two tiles in shared memory."""

        def scoped(total: Any) -> jax.Array:
            self.plgpu.wgmma(total, a, b.T)
            return total[...]

        return pl.run_scoped(scoped, self.plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32))

    def weights(
        self, logits: jax.Array, i: Any, j: Any, of_rows: Any, of_columns: Any, queries_axis: int = 0
    ) -> jax.Array:
        """Sigmoid of a tile of products of queries and keys, 0 where a key is not seen."""
        log2e = math.log2(math.e)
        p = 1 / (1 + jnp.exp2(logits * (-self.scale * log2e) - self.bias * log2e))
        layout = self.plgpu.Layout.WGMMA
        for row, column in zip(of_rows, of_columns, strict=True):
            of_row = lax.broadcast_in_dim(row[...], p.shape, (0,))
            of_column = lax.broadcast_in_dim(column[...], p.shape, (1,))
            p = jnp.where(of_row == of_column, p, 0.0)
        if not self.causal:
            return p

        def places(axis: int) -> jax.Array:
            return self.plgpu.broadcasted_iota(jnp.int32, p.shape, axis, layout=layout)

        row = places(queries_axis) + (i * self.queries + self.offset)
        return jnp.where(row >= places(1 - queries_axis) + j * self.keys, p, 0.0)

    def write(
        self, scoped: Callable[[Any], jax.Array], shape: tuple[int, int], factor: float, tile: Any, into: Any
    ) -> None:
        """Sums tiles in registers and copies the sum to global memory, by way of a tile in shared memory."""
        total = pl.run_scoped(scoped, self.plgpu.ACC(shape, jnp.float32))
        tile[...] = (total * factor).astype(tile.dtype)
        self.plgpu.commit_smem()
        self.plgpu.copy_smem_to_gmem(tile, into)
        self.plgpu.wait_smem_to_gmem(0)
