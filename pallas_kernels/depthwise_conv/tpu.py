"""Depthwise convolution by Mosaic TPU: a map in vector memory, channels along the lanes, no matrix unit.

    forward    grid (channels, batch)     z[i, j] = sum_uv x[i + u - p, j + v - q] K[u, v] + bias
    backward   grid (channels, batch)     dz = g activation'(z)
                                          dK[u, v] += sum_ij x[i + u - p, j + v - q] dz[i, j]
                                          dx = dz convolved with the kernel turned round

XLA runs such a sum on the matrix unit, whose product of 128 channels by 128 has one diagonal in use, and lays
the map out anew for it; here a register of 8 places and 128 channels takes a multiplication and an addition a
tap. A program has all places of a map for some channels: copied into a frame of zeros in float32, where a tap
is a shift. Nothing but the arrays themselves moves; the backward pass has the forward sum again in place of
reading it, and reads x and g once for all three cotangents.

Taps are unrolled along the width of the kernel, along its height in strips of rows: a strip's window of the
map stays in registers for all its taps. Strips of the last rows stand over the ones before.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blocks import blocks
from pallas_kernels.depthwise_conv import cost
from pallas_kernels.depthwise_conv.reference import ACTIVATIONS
from pallas_kernels.lint import masks
from pallas_kernels.op import Interpret, Unsupported
from pallas_kernels.padding import rounded

# Output rows and columns of a tile whose sums stay in registers, and taps that are unrolled.
BLOCKS = {"rows": 7, "columns": 16, "taps": 256}
DTYPES = ("bfloat16", "float32")
ROWS, LANES = 8, 128
# Of the 64 MiB of a v5p core some is taken; others have 128.
VECTOR_MEMORY = 48 * 2**20


def forward(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None, *, activation: str, interpret: Interpret
) -> jax.Array:
    """As the reference."""
    frame = _Frame(x, kernel)

    def body(x: Any, kernel: Any, bias: Any, out: Any, framed: Any) -> None:
        frame.fill(framed, x, frame.before)

        def finish(rows: Any, columns: Any, total: jax.Array) -> None:
            out[rows, columns] = ACTIVATIONS[activation](total + _over(bias[...], total)).astype(out.dtype)

        frame.convolve(framed, kernel, frame.before, finish)

    of_map, of_taps, of_bias = frame.specs()
    out = pl.pallas_call(
        body,
        grid=(frame.channel_blocks, frame.programs),
        in_specs=[of_map, of_taps, of_bias],
        out_specs=of_map,
        out_shape=frame.out(x.dtype),
        scratch_shapes=[frame.scratch()],
        name="depthwise_conv",
        metadata=frame.masks(3, 1),
        compiler_params=_compiler("parallel", "parallel"),
        cost_estimate=cost.forward(x, kernel, bias),
        interpret=interpret,
    )(frame.turned(x), frame.taps(kernel), _row(bias, x.shape[3]))
    return frame.restored(out)


def backward(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    cotangent: jax.Array,
    *,
    activation: str,
    interpret: Interpret,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Cotangents of the maps, the kernels and the biases."""
    frame = _Frame(x, kernel)
    channels = x.shape[3]

    def body(
        x: Any, g: Any, kernel: Any, turned: Any, bias: Any, d_x: Any, d_k: Any, d_b: Any, *scratch: Any
    ) -> None:
        framed, framed_g, sums, sum_b = scratch

        @pl.when(pl.program_id(1) == 0)
        def _() -> None:
            sums[...] = jnp.zeros_like(sums)
            sum_b[...] = jnp.zeros_like(sum_b)

        frame.fill(framed, x, frame.before)
        frame.fill(framed_g, g, frame.after)
        if activation != "none":

            def bend(rows: Any, columns: Any, total: jax.Array) -> None:
                _, pull = jax.vjp(ACTIVATIONS[activation], total + _over(bias[...], total))
                (d_z,) = pull(g[rows, columns].astype(jnp.float32))
                framed_g[frame.at(rows, columns, frame.after)] = d_z

            frame.convolve(framed, kernel, frame.before, bend)

        def finish(rows: Any, columns: Any, total: jax.Array) -> None:
            d_x[rows, columns] = total.astype(d_x.dtype)

        frame.convolve(framed_g, turned, frame.after, finish)
        frame.correlate(framed, framed_g, sums, sum_b)

        @pl.when(pl.program_id(1) == frame.programs - 1)
        def _() -> None:
            d_k[...] = jnp.sum(sums[...], axis=2)
            d_b[...] = jnp.sum(sum_b[...], axis=0, keepdims=True)

    of_map, of_taps, of_bias = frame.specs()
    height, width = frame.sides
    of_sums = pl.BlockSpec((frame.taps_high, width, frame.channels), lambda c, b: (0, 0, c))
    maps = frame.turned(x), frame.turned(cotangent)
    d_x, d_k, d_b = pl.pallas_call(
        body,
        grid=(frame.channel_blocks, frame.programs),
        in_specs=[of_map, of_map, of_taps, of_taps, of_bias],
        out_specs=[of_map, of_sums, of_bias],
        out_shape=[
            frame.out(x.dtype),
            jax.ShapeDtypeStruct((frame.taps_high, width, channels), jnp.float32),
            jax.ShapeDtypeStruct((1, channels), jnp.float32),
        ],
        scratch_shapes=[
            frame.scratch(),
            frame.scratch(),
            pltpu.VMEM((frame.taps_high, width, ROWS, frame.channels), jnp.float32),
            pltpu.VMEM((ROWS, frame.channels), jnp.float32),
        ],
        name="depthwise_conv_backward",
        metadata=frame.masks(5, 3),
        compiler_params=_compiler("parallel", "arbitrary"),
        cost_estimate=cost.backward(x, kernel, bias, activation),
        interpret=interpret,
    )(*maps, frame.taps(kernel), frame.taps(kernel[::-1, ::-1]), _row(bias, channels))
    d_x = frame.restored(d_x)
    return d_x, d_k[:height].astype(kernel.dtype), None if bias is None else d_b[0].astype(bias.dtype)


class _Frame:
    """Maps in zeros, and sums over them.

    A register has 8 columns of a map. Where a batch has whole eighths and a row has not, it has a place of 8
    maps: so XLA lays such arrays out, and no register has empty columns.

    Attributes:
      sides: of the kernel.
      before: rows and columns of zeros in front of a map, where the kernel is as it is.
      after: where it is turned round.
      channels: of a block.
      maps: of a program, beside each other in a register, or 1.
      taps_high: rows of the kernel, filled up to whole strips.
      rows: of a tile.
      columns: of a tile.
    """

    def __init__(self, x: jax.Array, kernel: jax.Array):
        if x.dtype.name not in DTYPES:
            raise Unsupported(f"depthwise_conv on TPU takes {' or '.join(DTYPES)}, not {x.dtype}.")
        self.sides = kernel.shape[:2]
        chosen = blocks("depthwise_conv", "x".join(map(str, self.sides)), BLOCKS)
        self.batch, self.height, self.width, self.all_channels = x.shape
        self.before = tuple((side - 1) // 2 for side in self.sides)
        self.after = tuple(side // 2 for side in self.sides)
        self.channels = min(self.all_channels, LANES)
        self.channel_blocks = -(-self.all_channels // self.channels)
        strips = -(-self.sides[0] // (chosen["taps"] // self.sides[1]))
        self.strip = -(-self.sides[0] // strips)
        self.taps_high = strips * self.strip
        self.row_tiles = -(-self.height // chosen["rows"])
        self.rows = -(-self.height // self.row_tiles)
        for maps in (ROWS, 1) if self.batch % ROWS == 0 and self.width % ROWS else (1,):
            self.maps = maps
            self.programs = self.batch // maps
            self.register = 1 if maps > 1 else ROWS
            self.columns = min(chosen["columns"] // (ROWS if maps > 1 else 1), self.width)
            self.column_tiles = -(-self.width // self.columns)
            # In front of a row stand whole registers, so that the map itself is stored without a shift.
            self.left = rounded(self.after[1], self.register)
            wide = rounded(self.column_tiles * self.columns, self.register)
            self.shape = (
                self.row_tiles * self.rows + self.taps_high - 1,
                self.left + wide + rounded(self.after[1], self.register),
            )
            if self._bytes(x.dtype.itemsize) <= VECTOR_MEMORY - 2**22:
                return
        raise Unsupported(
            f"depthwise_conv on TPU keeps a map in vector memory: {self.height} x {self.width} places and"
            f" a kernel of {self.sides[0]} x {self.sides[1]} are too large."
        )

    def _bytes(self, itemsize: int) -> int:
        """Of vector memory: two frames, the sums of the taps, and each of three maps twice."""
        lanes = self.maps * rounded(self.channels, LANES)
        framed = 2 * 4 * lanes * math.prod(self.shape)
        sums = 4 * rounded(self.channels, LANES) * ROWS * self.taps_high * self.sides[1]
        maps = 6 * itemsize * lanes * self.height * rounded(self.width, 2 * self.register)
        return framed + sums + maps

    def turned(self, array: jax.Array) -> jax.Array:
        """`[B, H, W, C]`, or `[H, W, B, C]` where a register has several maps."""
        return array.transpose(1, 2, 0, 3) if self.maps > 1 else array

    def restored(self, array: jax.Array) -> jax.Array:
        """`[B, H, W, C]` of what is turned."""
        return array.transpose(2, 0, 1, 3) if self.maps > 1 else array

    def out(self, dtype: Any) -> jax.ShapeDtypeStruct:
        places = self.height, self.width
        sides = (*places, self.batch) if self.maps > 1 else (self.batch, *places)
        return jax.ShapeDtypeStruct((*sides, self.all_channels), dtype)

    def specs(self) -> list[pl.BlockSpec]:
        """Blocks of maps, of kernels and of biases."""
        places = self.height, self.width
        if self.maps > 1:
            of_map = pl.BlockSpec((*places, self.maps, self.channels), lambda c, b: (0, 0, b, c))
        else:
            of_map = pl.BlockSpec((None, *places, self.channels), lambda c, b: (b, 0, 0, c))
        return [
            of_map,
            pl.BlockSpec((self.taps_high, self.sides[1], self.channels), lambda c, b: (0, 0, c)),
            pl.BlockSpec((1, self.channels), lambda c, b: (0, c)),
        ]

    def masks(self, inputs: int, outputs: int) -> dict[str, str]:
        """What stands over the end of the channels meets no other channel."""
        names = [f"in[{i}]" for i in range(inputs)] + [f"out[{i}]" for i in range(outputs)]
        return masks(*(names if self.all_channels % self.channels else ()))

    def scratch(self) -> Any:
        maps = (self.maps,) if self.maps > 1 else ()
        return pltpu.VMEM((*self.shape, *maps, self.channels), jnp.float32)

    def taps(self, kernel: jax.Array) -> jax.Array:
        """The kernel in float32, with rows of zeros up to whole strips."""
        return jnp.pad(kernel.astype(jnp.float32), ((0, self.taps_high - self.sides[0]), (0, 0), (0, 0)))

    def at(self, rows: Any, columns: Any, before: tuple[int, ...]) -> tuple[Any, Any]:
        """Where places of a map are in its frame: taps are counted from the corner, from `left - before`."""
        return pl.ds(rows.start + before[0], rows.size), pl.ds(columns.start + self.left, columns.size)

    def fill(self, framed: Any, array: Any, before: tuple[int, ...]) -> None:
        """Copies a map, and zeros around it."""
        framed[...] = jnp.zeros_like(framed)
        framed[self.at(pl.ds(0, self.height), pl.ds(0, self.width), before)] = array[...].astype(jnp.float32)

    def tiled(self, step: Callable[[Any, Any, Any], Any], state: Any, inside: bool) -> Any:
        """Runs through tiles of rows and columns; `inside` moves the last ones up to where the map ends."""

        def start(tile: Any, side: int, end: int) -> Any:
            return jnp.minimum(tile * side, end - side) if inside else tile * side

        def turn(i: Any, state: Any) -> Any:
            if self.maps > 1:
                down = lax.div(i, self.column_tiles)
                across = start(i - down * self.column_tiles, self.columns, self.width)
                rows = pl.ds(start(down, self.rows, self.height), self.rows)
                return step(rows, pl.ds(across, self.columns), state)
            # Registers are cut where the program is written.
            for first in range(0, self.width, self.columns):
                rows = pl.ds(start(i, self.rows, self.height), self.rows)
                state = step(rows, pl.ds(first, min(self.columns, self.width - first)), state)
            return state

        return _repeat(self.row_tiles * (self.column_tiles if self.maps > 1 else 1), turn, state)

    def window(self, framed: Any, s: Any, v: int, rows: Any, columns: Any, before: int) -> jax.Array:
        """What strip `s` of taps sees from a tile, in whole registers."""
        down = pl.ds(rows.start + s * self.strip, self.rows + self.strip - 1)
        across = columns.start + (self.left - before + v)
        return framed[down, pl.ds(across, rounded(columns.size, self.register))]

    def convolve(
        self, framed: Any, kernel: Any, before: tuple[int, ...], finish: Callable[[Any, Any, jax.Array], None]
    ) -> None:
        """Sums over all taps, tile by tile `[rows, columns, ..., C]`, and what is done with each."""

        def tile(rows: Any, columns: Any, _: None) -> None:
            def strip(s: Any, total: jax.Array) -> jax.Array:
                for v in range(self.sides[1]):
                    window = self.window(framed, s, v, rows, columns, before[1])
                    for u in range(self.strip):
                        tap = kernel[s * self.strip + u, v : v + 1]  # [1, C]
                        total = total + window[u : u + self.rows] * _over(tap, total)
                return total

            sides = self.rows, rounded(columns.size, self.register), *framed.shape[2:]
            total = _repeat(self.taps_high // self.strip, strip, jnp.zeros(sides, jnp.float32))
            finish(rows, columns, total[:, : columns.size])

        self.tiled(tile, None, inside=True)

    def correlate(self, framed: Any, framed_g: Any, sums: Any, sum_b: Any) -> None:
        """Adds to the sums of each tap, and of none, over all places: the 8 of a register apart."""

        def of_tile(rows: Any, columns: Any) -> jax.Array:
            return framed_g[
                self.at(rows, pl.ds(columns.start, rounded(columns.size, self.register)), self.after)
            ]

        def of_bias(rows: Any, columns: Any, total: jax.Array) -> jax.Array:
            return total + _together(of_tile(rows, columns))

        zero = jnp.zeros((ROWS, self.channels), jnp.float32)
        sum_b[...] += self.tiled(of_bias, zero, inside=False)

        def of_strip(s: Any, _: None) -> None:
            for v in range(self.sides[1]):

                def tile(rows: Any, columns: Any, totals: tuple[jax.Array, ...], v: int = v) -> Any:
                    window = self.window(framed, s, v, rows, columns, self.before[1])
                    d_z = of_tile(rows, columns)
                    return tuple(
                        total + _together(window[u : u + self.rows] * d_z) for u, total in enumerate(totals)
                    )

                totals = self.tiled(tile, (zero,) * self.strip, inside=False)
                for u, total in enumerate(totals):
                    sums[s * self.strip + u, v] += total

        _repeat(self.taps_high // self.strip, of_strip, None)


def _repeat(times: int, step: Callable[[Any, Any], Any], state: Any) -> Any:
    """A loop, where there is more than one turn."""
    return step(0, state) if times == 1 else lax.fori_loop(0, times, step, state)


def _together(array: jax.Array) -> jax.Array:
    """A tile added up to one register."""
    return jnp.sum(array.reshape(-1, ROWS, array.shape[-1]), axis=0)


def _over(row: jax.Array, tile: jax.Array) -> jax.Array:
    """A row of channels `[1, C]`, of the rank of a tile."""
    return row.reshape((1,) * (tile.ndim - 1) + row.shape[-1:])


def _row(bias: jax.Array | None, channels: int) -> jax.Array:
    return jnp.zeros((1, channels), jnp.float32) if bias is None else bias.astype(jnp.float32)[None]


def _compiler(*semantics: Literal["parallel", "arbitrary"]) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VECTOR_MEMORY)
