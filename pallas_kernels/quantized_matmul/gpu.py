"""The product by Mosaic GPU for Hopper: codes come by TMA, and columns stand in the place of rows.

    grid (tiles of columns, parts of the inputs, tiles of rows)

A wgmma has 64 rows at least and 8 columns at least: y^T = W^T x^T wastes nothing at few rows. Bytes are
unpacked in registers and put into shared memory, from where wgmma reads W^T turned: from registers it reads
only what is turned already. There is no shift: a piece is cut out where it lies in its byte, and its number,
which bfloat16 and float16 hold, multiplied by a power of two. A piece of a byte is every so many-th input,
which is the order that x comes in; the high pieces of 3 bits have another one, and products of their own.

Registers hold 64 rows of bytes, so a tile may have several groups: each has products of its own, and its
scale is applied to their sums in registers. Parts of the inputs are summed by XLA: without them there would
be fewer programs than multiprocessors. Columns that are no multiple of a tile are filled up, in a copy.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import versions
from pallas_kernels.blocks import blocks
from pallas_kernels.emulate import emulated
from pallas_kernels.op import Interpret, Unsupported
from pallas_kernels.padding import padded, rounded
from pallas_kernels.quantized_matmul import cost
from pallas_kernels.quantized_matmul.reference import widths

# Columns of a tile, tiles that are under way at a time, and how many programs there shall be.
BLOCKS = {"columns": 64, "stages": 4, "programs": 528}
DTYPES = ("bfloat16", "float16")
# Rows of x in a tile; rows of bytes; rows of the bytes of a group, which wgmma takes 16 at a time.
LEAST, ROWS, BYTES, LEAST_BYTES = 8, 64, 64, 16
# Two programs of that have a multiprocessor.
SHARED = 104 * 1024


def forward(
    x: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None,
    low: jax.Array,
    high: jax.Array | None = None,
    *,
    bits: int,
    interpret: Interpret,
) -> jax.Array:
    """As the reference."""
    plan = _Codes("quantized_matmul", x, scale, widths(bits), bits)
    plgpu = versions.mosaic_gpu()
    planes = [padded(plane, 1, plan.columns) for plane in (low, high) if plane is not None]
    of_groups = [scale, *([] if zero is None else [zero.astype(x.dtype)])]
    of_groups = [padded(array, 1, plan.columns) for array in of_groups]
    rows = padded(x, 0, plan.rows)
    sums = plan.sums(rows)
    ordered = [plan.ordered(rows, width) for width in plan.widths]
    columns = planes[0].shape[1]
    grid = (columns // plan.columns, plan.splits, rows.shape[0] // plan.rows)
    kernel = versions.mosaic_gpu_kernel(
        plan.body,
        out=jax.ShapeDtypeStruct((plan.splits, columns, rows.shape[0]), jnp.float32),
        scratch=[
            plgpu.SMEM((plan.inputs, plan.columns), x.dtype),
            plgpu.SMEM((plan.columns, plan.rows), jnp.float32),
        ],
        grid=grid,
        grid_names=("columns", "part", "rows"),
        name="quantized_matmul",
        cost=cost.forward(x, scale, *planes, zero=zero),
        approximate=True,
    )
    out = (emulated(kernel) if interpret else kernel)(sums, *of_groups, *ordered, *planes)
    return jnp.sum(out, axis=0).T[: x.shape[0], : scale.shape[1]].astype(x.dtype)


class Tiles:
    """How the arrays are cut, and what is done with a tile.

    Attributes:
      rows: of a tile.
      columns: of a tile.
      inputs: of a tile.
      part: of them those that share a scale.
      splits: parts of the inputs.
      steps: tiles of a part.
    """

    def __init__(self, op: str, x: jax.Array, scale: jax.Array, widths: tuple[int, ...], bits: int):
        if x.dtype.name not in DTYPES:
            raise Unsupported(f"{op} on GPU takes {' or '.join(DTYPES)}, not {x.dtype}.")
        chosen = blocks(op, f"b{bits}", BLOCKS)
        self.dtype, self.bits, self.widths = x.dtype, bits, widths
        self.group = x.shape[1] // scale.shape[-2]
        self.inputs = BYTES * 8 // min(self.widths)
        self.part = min(self.group, self.inputs)
        least = LEAST_BYTES * 8 // min(self.widths)
        if self.group < least or self.inputs % self.part or self.group % self.part:
            raise Unsupported(
                f"{op} on GPU takes groups of {least} weights at {bits} bits, or of that times a"
                f" power of two up to {self.inputs}, or a multiple of {self.inputs}, not {self.group}."
            )
        if x.shape[1] % self.inputs:
            raise Unsupported(
                f"{op} on GPU takes a multiple of {self.inputs} inputs at {bits} bits, not {x.shape[1]}."
            )
        self.columns = chosen["columns"]
        # Registers for more rows there are where few pieces are made of a byte.
        self.rows = min(rounded(x.shape[0], LEAST), ROWS if min(widths) > 1 else ROWS // 4)
        of_x = 2 * self.inputs * self.rows * len(self.widths)
        of_codes = self.inputs * self.columns * bits // 8
        own = self.columns * (2 * self.inputs + 4 * self.rows)
        self.stages = max(min(chosen["stages"], (SHARED - own) // (of_x + of_codes)), 2)
        tiles = x.shape[1] // self.inputs
        programs = -(-scale.shape[-1] // self.columns) * -(-x.shape[0] // self.rows)
        wanted = -(-chosen["programs"] // programs)
        self.splits = max(count for count in range(1, tiles + 1) if tiles % count == 0 and count <= wanted)
        self.steps = tiles // self.splits
        self.plgpu = versions.mosaic_gpu()

    def sums(self, rows: jax.Array) -> jax.Array:
        """Sums over the inputs of a tile that share a scale, `[K / part, R']`."""
        parts = rows.reshape(rows.shape[0], -1, self.part)
        return jnp.sum(parts, axis=2, dtype=jnp.float32).T

    def bytes_of(self, width: int) -> int:
        """Rows of bytes of a plane, of those inputs of a tile that share a scale."""
        return self.part * width // 8

    def ordered(self, rows: jax.Array, width: int) -> jax.Array:
        """x as its inputs stand at the pieces of a tile: `[K / bytes, R', bytes]`, of the bytes of a part."""
        each = 8 // width
        tiled = rows.reshape(rows.shape[0], -1, self.inputs // each, each)
        pieces = tiled.swapaxes(2, 3).reshape(rows.shape[0], -1, self.bytes_of(width))
        return pieces.swapaxes(0, 1)

    def group_of(self, tile: Any) -> Any:
        """Where the scales of a tile stand, in blocks of as many as a tile has."""
        each = self.group // self.part
        return lax.div(tile, each) if each > 1 else tile

    def stream(self, step: Any, specs: list[Any], arrays: list[Any], out_tile: Any, into: Any) -> None:
        """Sums over the tiles of a part, and copies the sum to global memory by way of shared memory."""
        pipeline = self.plgpu.emit_pipeline(
            step,
            grid=(self.steps,),
            in_specs=specs,
            max_concurrent_steps=min(self.stages, self.steps),
            init_carry=self.plgpu.layout_cast(
                jnp.zeros((self.columns, self.rows), jnp.float32), self.plgpu.Layout.WGMMA
            ),
        )
        out_tile[...] = pipeline(*arrays)
        self.plgpu.commit_smem()
        self.plgpu.copy_smem_to_gmem(out_tile, into)
        self.plgpu.wait_smem_to_gmem(0)

    def along(self, tile: Any, row: int, axis: int) -> jax.Array:
        """A row of a tile in float32, along an axis of the sums."""
        return lax.broadcast_in_dim(tile[row].astype(jnp.float32), (self.columns, self.rows), [axis])

    def unpack(self, plane: Any, width: int, low: int, weights: Any) -> None:
        """Puts the pieces of a tile into shared memory, those of a place in a byte after each other."""
        count = plane.shape[0]
        for start in range(0, count, BYTES):
            whole = plane[pl.ds(start, BYTES)]  # [64, columns]
            for p in range(8 // width):
                piece = (whole & ((2**width - 1) << p * width)).astype(self.dtype)
                if low != p * width:
                    piece = piece * 2.0 ** (low - p * width)
                weights[pl.ds(p * count + start, BYTES)] = piece
        self.plgpu.commit_smem()

    def product(self, weights: Any, j: int, width: int, ordered: Any) -> jax.Array:
        """Sums of products with the pieces of part j of a tile."""
        size = self.bytes_of(width)

        def scoped(into: Any) -> jax.Array:
            for p in range(8 // width):
                at = p * (self.inputs // self.part) + j
                self.plgpu.wgmma(into, weights.at[pl.ds(at * size, size)].T, ordered.at[at].T)
            return into[...]

        return pl.run_scoped(scoped, self.plgpu.ACC((self.columns, self.rows), jnp.float32))


class _Codes(Tiles):
    """What a program does."""

    def body(self, sums: Any, scale: Any, *others: Any) -> None:
        *arrays, out, weights, out_tile = others
        count, many = len(self.widths), self.inputs // self.part
        has_zero = len(arrays) > 2 * count
        n, part, r = (lax.axis_index(axis) for axis in ("columns", "part", "rows"))
        block = self.plgpu.BlockSpec

        def tile(place: Any) -> Any:
            return part * self.steps + place

        def of_group(place: Any) -> Any:
            return self.group_of(tile(place))

        specs = [block((many, self.rows), lambda place: (tile(place), r))]
        specs += [block((many, self.columns), lambda place: (of_group(place), n))] * (1 + has_zero)
        for width in self.widths:
            side = self.inputs // self.bytes_of(width), self.rows, self.bytes_of(width)
            specs.append(block(side, lambda place: (tile(place), r, 0)))
        for width in self.widths:
            specs.append(block((self.inputs * width // 8, self.columns), lambda place: (tile(place), n)))

        def step(_: Any, sums: Any, scale: Any, *others: Any) -> Any:
            *tiles, total = others
            zero, numbers, codes = tiles[: -2 * count], tiles[-2 * count : -count], tiles[-count:]
            low = 0
            for plane, width, ordered in zip(codes, self.widths, numbers, strict=True):
                self.unpack(plane, width, low, weights)

                def of_part(j: Any, total: Any, low: int = low, width: int = width, x: Any = ordered) -> Any:
                    summed = self.product(weights, j, width, x)  # [columns, rows]
                    if not low:
                        code = self.along(zero[0], j, 0) if has_zero else 2.0 ** (self.bits - 1)
                        summed = summed - self.along(sums, j, 1) * code
                    return total + summed * self.along(scale, j, 0)

                total = lax.fori_loop(0, many, of_part, total) if many > 1 else of_part(0, total)
                low += width
            return total

        at = pl.ds(n * self.columns, self.columns), pl.ds(r * self.rows, self.rows)
        self.stream(step, specs, [sums, scale, *arrays], out_tile, out.at[part, *at])
