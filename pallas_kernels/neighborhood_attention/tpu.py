"""Attention to neighbours by Mosaic TPU: a map in vector memory, tiles of queries with the keys they see.

    forward    grid (heads, batch)     of every tile   s = k q^T + b,  p = softmax(s),  o = p^T v
    backward   grid (heads, batch)     of every tile   dp = v do^T,  ds = p (dp - sum p dp),  db += ds
                                                       dv += p do,  dk += ds q,  dq = ds^T k

A program has the whole map for as many heads as fill the lanes. It copies queries, keys and values into
frames in float32, which `axes.py` lays out: rolled, dilated and cut into windows by where places go, so that
nothing is copied outside, and what a tile reads begins with a register. All of a tile's keys are at hand: no
sums of a softmax are kept, neither between tiles nor for the backward pass, which computes the logits again.

Logits are transposed, keys down and the queries of all heads beside each other: those of 49 places would
leave most of the lanes empty. The queries of a head have zeros in the channels of the others, so that one
product does for all heads; it is no larger than one, as the matrix unit would have been empty there.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blocks import blocks
from pallas_kernels.neighborhood_attention import cost
from pallas_kernels.neighborhood_attention.axes import NEVER, Axis, Cut, cut, fitted, on_tile, outer
from pallas_kernels.op import Interpret, Unsupported
from pallas_kernels.padding import rounded

# Tiles that are written out at most, so that one runs while another waits; queries of a tile at most.
BLOCKS = {"tiles": 8, "queries": 128}
DTYPES = ("bfloat16", "float32")
ROWS, LANES = 8, 128
# Channels of heads beside each other at most.
WIDEST = 256
# Of the 64 MiB of a v5p core some is taken; others have 128.
VECTOR_MEMORY = 48 * 2**20
# Powers are of 2, as the hardware has them.
LOG2_E = math.log2(math.e)


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None = None,
    *,
    axes: tuple[Axis, ...],
    scale: float,
    interpret: Interpret,
) -> jax.Array:
    """As the reference."""
    plan = _Plan(q, axes, scale, backward=False)
    added = plan.added(bias)

    def body(q: Any, k: Any, v: Any, *others: Any) -> None:
        *added, out, q_frame, k_frame, v_frame, o_frame, stage = others
        plan.fill(q_frame, q, stage, 0)
        plan.fill(k_frame, k, stage, 1)
        plan.fill(v_frame, v, stage, 1)

        def tile(place: _Place) -> None:
            queries = plan.stacked(place.queries(q_frame))  # [columns, C]
            p = plan.weights(place.keys(k_frame, plan.dtype), queries, added, place)
            o = plan.dot(p.astype(plan.dtype), place.keys(v_frame, plan.dtype), 0, 0)  # [columns, C]
            place.store(o_frame, plan.own(o))

        plan.run(tile)
        plan.empty(out, o_frame, stage, 0)

    of_map = plan.spec()
    out = pl.pallas_call(
        body,
        grid=(plan.head_blocks, plan.batch),
        in_specs=[of_map, of_map, of_map, *plan.specs(added)],
        out_specs=of_map,
        out_shape=plan.shape,
        scratch_shapes=[plan.frame(side) for side in (0, 1, 1, 0)] + [plan.stage],
        name="neighborhood_attention",
        compiler_params=_compiler("parallel", "parallel"),
        cost_estimate=cost.forward(q, k, v, bias, axes=axes),
        interpret=interpret,
    )(*(plan.arranged(x) for x in (q, k, v)), *added)
    return plan.restored(out)


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
    cotangent: jax.Array,
    *,
    axes: tuple[Axis, ...],
    scale: float,
    interpret: Interpret,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Cotangents of queries, keys, values and the bias."""
    plan = _Plan(q, axes, scale, backward=True)
    added = plan.added(bias)
    count, biases = len(added), added[: 0 if bias is None else 1]

    def body(q: Any, k: Any, v: Any, do: Any, *others: Any) -> None:
        added, (d_q, d_k, d_v, *left) = others[:count], others[count:]
        *d_bias, q_frame, k_frame, v_frame, do_frame, dq_frame, dk_frame, dv_frame, stage = left
        for frame, array, side in ((q_frame, q, 0), (k_frame, k, 1), (v_frame, v, 1), (do_frame, do, 0)):
            plan.fill(frame, array, stage, side)
        dk_frame[...] = jnp.zeros_like(dk_frame)
        dv_frame[...] = jnp.zeros_like(dv_frame)
        if d_bias:

            @pl.when(pl.program_id(1) == 0)
            def _() -> None:
                d_bias[0][...] = jnp.zeros_like(d_bias[0])

        def tile(place: _Place) -> None:
            queries = plan.stacked(place.queries(q_frame))  # [columns, C]
            given = plan.stacked(place.queries(do_frame))  # [columns, C]
            keys = place.keys(k_frame, plan.dtype)  # [keys, C]
            p = plan.weights(keys, queries, added, place)  # [keys, columns]
            d_p = plan.dot(place.keys(v_frame, plan.dtype), given, 1, 1)
            d_s = p * (d_p - jnp.sum(p * d_p, axis=0, keepdims=True))
            if d_bias:
                d_bias[0][...] += d_s
            rounded_d_s = d_s.astype(plan.dtype)
            place.add(dv_frame, plan.dot(p.astype(plan.dtype), given, 1, 0))
            place.add(dk_frame, plan.dot(rounded_d_s, queries, 1, 0))
            place.store(dq_frame, plan.own(plan.dot(rounded_d_s, keys, 0, 0)))

        plan.run(tile)
        plan.empty(d_q, dq_frame, stage, 0, scale)
        plan.empty(d_k, dk_frame, stage, 1, scale)
        plan.empty(d_v, dv_frame, stage, 1)

    of_map = plan.spec()
    d_q, d_k, d_v, *d_bias = pl.pallas_call(
        body,
        grid=(plan.head_blocks, plan.batch),
        in_specs=[of_map, of_map, of_map, of_map, *plan.specs(added)],
        out_specs=[of_map, of_map, of_map, *plan.specs(biases)],
        out_shape=[plan.shape] * 3 + [jax.ShapeDtypeStruct(one.shape, jnp.float32) for one in biases],
        scratch_shapes=[plan.frame(side) for side in (0, 1, 1, 0, 0, 1, 1)] + [plan.stage],
        name="neighborhood_attention_backward",
        # The sums of the bias are over the batch.
        compiler_params=_compiler("parallel", "parallel" if bias is None else "arbitrary"),
        cost_estimate=cost.backward(q, k, v, bias, axes),
        interpret=interpret,
    )(*(plan.arranged(x) for x in (q, k, v, cotangent)), *added)
    given = None if bias is None else plan.of_bias(bias)[1](d_bias[0])[0]
    return plan.restored(d_q), plan.restored(d_k), plan.restored(d_v), given


class _Place:
    """Where a tile is in the frames, and which mask it has."""

    def __init__(self, number: Any, cuts: tuple[Cut, ...]):
        self.kind: Any = 0
        numbers: list[Any] = []
        for one in cuts[:0:-1]:
            rest = lax.div(number, one.count)
            numbers, number = [number - rest * one.count, *numbers], rest
        queries, keys = [], []
        for place, one in zip([number, *numbers], cuts, strict=True):
            of_queries, of_keys, kind = one.start(place)
            queries.append((of_queries, one.tile))
            keys.append((of_keys, one.region))
            self.kind = self.kind * len(one.kinds) + kind
        self.sides = [[side for _, side in one] for one in (queries, keys)]
        self.at_queries, self.at_keys = (
            (pl.ds(*first), pl.ds(*second), pl.ds(pl.multiple_of(last[0], ROWS), last[1]))
            for first, second, last in (queries, keys)
        )

    def queries(self, frame: Any) -> jax.Array:
        """`[queries, C]`."""
        return frame[self.at_queries].reshape(-1, frame.shape[-1])

    def keys(self, frame: Any, dtype: Any) -> jax.Array:
        """`[keys, C]`."""
        return frame[self.at_keys].reshape(-1, frame.shape[-1]).astype(dtype)

    def store(self, frame: Any, rows: jax.Array) -> None:
        """Replaces the queries."""
        frame[self.at_queries] = rows.reshape(*self.sides[0], rows.shape[-1])

    def add(self, frame: Any, rows: jax.Array) -> None:
        """Adds to the keys, which other tiles have too."""
        frame[self.at_keys] += rows.reshape(*self.sides[1], rows.shape[-1])


class _Plan:
    """How a map of three axes is cut, and what is done with a tile.

    Attributes:
      order: the axes of the map as they stand in memory; the last one is filled up to registers.
      cuts: of these.
      beside: heads of a program.
      head_blocks: how many programs have all heads.
    """

    def __init__(self, q: jax.Array, axes: tuple[Axis, ...], scale: float, backward: bool):
        if q.dtype.name not in DTYPES:
            raise Unsupported(f"neighborhood_attention on TPU takes {' or '.join(DTYPES)}, not {q.dtype}.")
        self.given, self.dtype, self.scale, self.axes = q.shape, q.dtype, scale, axes
        self.heads, self.size = q.shape[-2:]
        self.precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else lax.Precision.DEFAULT
        self.beside = _beside(self.heads, self.size)
        # Heads that do not fill lanes together stand before the places.
        self.turned = self.beside == 0
        self.beside = max(self.beside, 1)
        self.batch, self.head_blocks = q.shape[0], self.heads // self.beside
        self.lanes = self.beside * self.size
        chosen = blocks("neighborhood_attention", "x".join(str(axis.window) for axis in axes), BLOCKS)
        self.order, self.cuts = _best_cuts(axes, self.beside, chosen["queries"])
        whole = [*(axes[i] for i in self.order)]
        self.sides = (1,) * (3 - len(axes)) + tuple(axis.length for axis in whole)
        self.queries = math.prod(one.tile for one in self.cuts)
        self.keys = math.prod(one.region for one in self.cuts)
        # The backward pass has products over the queries: zeros fill up the lanes.
        self.columns = rounded(self.beside * self.queries, LANES if backward else 1)
        self.tiles = math.prod(one.count for one in self.cuts)
        self.together = max(n for n in range(1, chosen["tiles"] + 1) if self.tiles % n == 0)
        self.strided = self.cuts[2].axis.dilation > 1
        rows, channels = (self.heads, self.size) if self.turned else (1, self.heads * self.size)
        self.shape = jax.ShapeDtypeStruct((self.batch * rows, *self.sides, channels), q.dtype)
        if self._bytes(backward) > VECTOR_MEMORY:
            raise Unsupported(
                f"neighborhood_attention on TPU keeps a map in vector memory: {q.shape[1:-2]} places with"
                f" windows of {[axis.window for axis in axes]} are too many."
            )

    def _bytes(self, backward: bool) -> int:
        """Of vector memory: frames, each array twice, what is added to logits, and logits in use."""
        lanes = rounded(self.lanes, LANES)
        places = math.prod(self.sides[:2]) * rounded(self.sides[2], 2 * ROWS)
        frames = (3 if backward else 2) * math.prod(self._sides(0)) + (4 if backward else 2) * math.prod(
            self._sides(1)
        )
        arrays = 2 * (7 if backward else 4) * places * self.shape.dtype.itemsize
        logits = self.keys * rounded(self.columns, LANES)
        kinds = math.prod(len(one.kinds) for one in self.cuts)
        return lanes * (4 * (frames + places * self.strided) + arrays) + 4 * logits * (2 * kinds + 14)

    def _sides(self, side: int) -> tuple[int, ...]:
        """Of a frame: of queries 0, of keys 1."""
        return tuple(one.axis.groups * (one.keys if side else one.queries) for one in self.cuts)

    def frame(self, side: int) -> Any:
        """Memory for the places of all tiles."""
        return pltpu.VMEM((*self._sides(side), rounded(self.lanes, LANES)), jnp.float32)

    @property
    def stage(self) -> Any:
        """Memory for a map in float32, of which rows are read with a stride."""
        return pltpu.VMEM((*self.sides, self.lanes) if self.strided else (1, 1, ROWS, LANES), jnp.float32)

    def spec(self) -> pl.BlockSpec:
        """Blocks of maps."""
        block = (None, *self.sides, self.lanes)
        if self.turned:
            return pl.BlockSpec(block, lambda h, b: (b * self.heads + h, 0, 0, 0, 0))
        return pl.BlockSpec(block, lambda h, b: (b, 0, 0, 0, h))

    def specs(self, added: Sequence[jax.Array]) -> list[pl.BlockSpec]:
        """Blocks of what is added to the logits: of the heads of a program, and of masks all."""
        return [
            pl.BlockSpec((None, *one.shape[1:]), lambda h, b: (h, 0, 0))
            if one.ndim == 3
            else pl.BlockSpec(one.shape, lambda h, b: (0, 0, 0, 0))
            for one in added
        ]

    def arranged(self, x: jax.Array) -> jax.Array:
        """`[B, *map, H, D]` as `[B, sides, H D]`, or with heads before the places."""
        count = len(self.axes)
        places = [1 + i for i in self.order]
        if self.turned:
            x = x.transpose(0, 1 + count, *places, 2 + count)
        elif self.order != tuple(range(count)):
            x = x.transpose(0, *places, 1 + count, 2 + count)
        return x.reshape(self.shape.shape)

    def restored(self, y: jax.Array) -> jax.Array:
        """`[B, *map, H, D]` of what is arranged."""
        count = len(self.axes)
        sides = self.sides[3 - count :]
        back = [self.order.index(i) for i in range(count)]
        if self.turned:
            y = y.reshape(self.given[0], self.heads, *sides, self.size)
            return y.transpose(0, *(2 + i for i in back), 1, 2 + count)
        y = y.reshape(self.given[0], *sides, self.heads, self.size)
        if self.order == tuple(range(count)):
            return y
        return y.transpose(0, *(1 + i for i in back), 1 + count, 2 + count)

    def added(self, bias: jax.Array | None) -> list[jax.Array]:
        """What is added to the logits of a tile: the bias, and masks of all kinds."""
        kinds = [len(one.kinds) for one in self.cuts]
        added = [] if bias is None else [LOG2_E * self.of_bias(bias)[0]]
        if math.prod(kinds) > 1 or not all(one.kinds.all() for one in self.cuts):
            seen = outer([jnp.asarray(one.kinds) for one in self.cuts]).swapaxes(1, 2)
            mask = jnp.where(jnp.tile(seen, (1, 1, self.beside)), 0.0, NEVER)
            added.append(self._widened(mask)[:, None])
        return added

    def of_bias(self, bias: jax.Array) -> tuple[jax.Array, Callable[[jax.Array], tuple[jax.Array]]]:
        """The bias of a tile, `[head blocks, keys, columns]`, and how cotangents go back."""

        def spread(bias: jax.Array) -> jax.Array:
            count, more = len(self.axes), 3 - len(self.axes)
            if self.axes[0].shift is None:
                bias = bias.transpose(*self.order, count)
                bias = bias.reshape(*(1,) * more, *bias.shape)
            else:
                windows = [axis.window for axis in self.axes]
                sides = [1 + i for i in self.order], [1 + count + i for i in self.order]
                whole = bias.reshape(-1, *windows, *windows).transpose(0, *sides[0], *sides[1])
                bias = whole.reshape(bias.shape)
            tile = on_tile(bias, self.cuts)  # [H, queries, keys]
            tile = tile.reshape(-1, self.beside, *tile.shape[1:])
            return self._widened(tile.transpose(0, 3, 1, 2).reshape(tile.shape[0], self.keys, -1))

        return jax.vjp(spread, bias)

    def _widened(self, array: jax.Array) -> jax.Array:
        """Zeros for what is no query."""
        return jnp.pad(array, ((0, 0), (0, 0), (0, self.columns - array.shape[2])))

    def fill(self, frame: Any, array: Any, stage: Any, side: int) -> None:
        """Copies a map into a frame, in which zeros are between the places and fill up the lanes."""
        if frame.shape != array.shape:
            frame[...] = jnp.zeros_like(frame)
        if self.strided:
            stage[...] = array[...].astype(jnp.float32)

        def copy(at_frame: Any, at_array: Any) -> None:
            source = stage if self.strided else array
            frame[(*at_frame, pl.ds(0, self.lanes))] = source[at_array].astype(jnp.float32)

        self._copies(copy, side)

    def empty(self, array: Any, frame: Any, stage: Any, side: int, factor: float = 1.0) -> None:
        """Copies a frame times a factor into a map."""

        def copy(at_frame: Any, at_array: Any) -> None:
            into = stage if self.strided else array
            places = frame[(*at_frame, pl.ds(0, self.lanes))]
            into[at_array] = (places * factor).astype(into.dtype)

        self._copies(copy, side)
        if self.strided:
            array[...] = stage[...].astype(array.dtype)

    def _copies(self, copy: Callable[[Any, Any], None], side: int) -> None:
        for pieces in itertools.product(*(one.pieces for one in self.cuts)):
            _copy(copy, [(piece[side], *piece[2:]) for piece in pieces])

    def run(self, tile: Callable[[_Place], None]) -> None:
        """Does all tiles, some of them written out.

        These are done at once as far as none reads what another writes: results have frames of their own.
        """

        def some(number: Any, _: None) -> None:
            for i in range(self.together):
                tile(_Place(number * self.together + i, self.cuts))

        lax.fori_loop(0, self.tiles // self.together, some, None)

    def weights(self, keys: jax.Array, queries: jax.Array, added: Sequence[Any], place: _Place) -> jax.Array:
        """Softmax over the keys of a tile, `[keys, columns]` in float32."""
        s = self.dot(keys, queries, 1, 1) * (self.scale * LOG2_E)
        for one in added:
            s = s + (one[...] if len(one.shape) == 2 else one[place.kind, 0])
        p = jnp.exp2(s - jnp.max(s, axis=0, keepdims=True))
        return p * (1 / jnp.sum(p, axis=0, keepdims=True))

    def stacked(self, rows: jax.Array) -> jax.Array:
        """`[queries, C]` as `[columns, C]`, those of each head with its own channels alone."""
        parts = [rows]
        if self.beside > 1:
            parts = [jnp.where(own, rows, 0) for own in self._channels(rows)]
        missing = self.columns - self.beside * self.queries
        if missing:
            parts.append(jnp.zeros((missing, rows.shape[1]), rows.dtype))
        return jnp.concatenate(parts, axis=0).astype(self.dtype)

    def own(self, rows: jax.Array) -> jax.Array:
        """`[columns, C]` as `[queries, C]`, of each head its own channels."""
        parts = [rows[head * self.queries : (head + 1) * self.queries] for head in range(self.beside)]
        whole = parts[0]
        for own, part in zip(self._channels(whole)[1:], parts[1:], strict=True):
            whole = jnp.where(own, part, whole)
        return whole

    def _channels(self, rows: jax.Array) -> list[jax.Array]:
        """Which channels are those of each head."""
        channel = lax.broadcasted_iota(jnp.int32, (self.queries, rows.shape[-1]), 1)
        edges = [head * self.size for head in range(self.beside + 1)]
        return [(channel >= low) & (channel < high) for low, high in itertools.pairwise(edges)]

    def dot(self, a: jax.Array, b: jax.Array, i: int, j: int) -> jax.Array:
        """The product over axis i of one and axis j of the other, in float32."""
        axes = (((i,), (j,)), ((), ()))
        return lax.dot_general(a, b, axes, precision=self.precision, preferred_element_type=jnp.float32)


def _copy(copy: Callable[[Any, Any], None], pieces: list[tuple[int, int, int, int]]) -> None:
    """Copies places of three axes; along the first two a stride is a loop."""
    *leading, last = pieces

    def at(left: list[tuple[int, int, int, int]], frames: list[Any], arrays: list[Any]) -> None:
        if not left:
            frame, array, count, stride = last
            spread = pl.ds(array, count, stride=stride) if stride > 1 else pl.ds(array, count)
            copy((*frames, pl.ds(frame, count)), (*arrays, spread))
            return
        frame, array, count, stride = left[0]
        if stride == 1:
            at(left[1:], [*frames, pl.ds(frame, count)], [*arrays, pl.ds(array, count)])
            return

        def step(i: Any, _: None) -> None:
            at(left[1:], [*frames, pl.ds(frame + i, 1)], [*arrays, pl.ds(array + i * stride, 1)])

        lax.fori_loop(0, count, step, None)

    at(leading, [], [])


def _beside(heads: int, size: int) -> int:
    """Heads whose channels are whole lanes together, or all of them; 0 where there are none such."""
    fitting = [
        count
        for count in range(1, heads + 1)
        if heads % count == 0
        and (count * size % LANES == 0 or count == heads)
        and (count * size <= WIDEST or count == 1)
    ]
    return min(fitting, default=0)


@functools.lru_cache(maxsize=256)
def _best_cuts(axes: tuple[Axis, ...], beside: int, most: int) -> tuple[tuple[int, ...], tuple[Cut, ...]]:
    """An order of the axes, and tiles, that need few registers of logits: three cuts."""
    found = []
    for last in reversed(range(len(axes))):
        order = (*(i for i in range(len(axes)) if i != last), last)
        filled = [Axis(1, 1, shift=None if axes[0].shift is None else 0)] * (3 - len(axes))
        turned = [*filled, *(axes[i] for i in order)]
        # Another order is copied outside: it must be worth that.
        price = 1.0 if last == len(axes) - 1 else 1.5
        for tiles in itertools.product(*_sizes(turned, most)):
            if math.prod(tiles) > most and turned[0].shift is None:
                continue
            cuts = [
                fitted(axis, tile, unit) for axis, tile, unit in zip(turned, tiles, (1, 1, ROWS), strict=True)
            ]
            count = math.prod(axis.groups * one[0] for axis, one in zip(turned, cuts, strict=True))
            keys = math.prod(one[1] for one in cuts)
            registers = keys // ROWS * (rounded(beside * math.prod(tiles), LANES) // LANES)
            found.append((price * count * (registers + 24), order, tiles, turned))
    _, order, tiles, turned = min(found, key=lambda one: one[0])
    whole = (cut(axis, tile, unit) for axis, tile, unit in zip(turned, tiles, (1, 1, ROWS), strict=True))
    return order, tuple(whole)


def _sizes(axes: list[Axis], most: int) -> list[list[int]]:
    """Tiles that are tried along each axis: windows as a whole, and else what fits."""
    sizes = []
    for axis, unit in zip(axes, (1, 1, ROWS), strict=True):
        length = rounded(-(-axis.length // axis.dilation), unit)
        if axis.shift is not None:
            sizes.append([rounded(axis.window, unit)])
        else:
            sizes.append(list(range(unit, min(length, 16 if unit == 1 else most) + 1, unit)))
    return sizes


def _compiler(*semantics: Literal["parallel", "arbitrary"]) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VECTOR_MEMORY + 2**23)
