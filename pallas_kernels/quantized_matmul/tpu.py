"""The product by Mosaic TPU: two bytes are a number of 16 bits, whose pieces become bfloat16 by bits alone.

A program has some columns of all codes. Four bytes of a column are a word of 32 bits, and

    ((word >> p w) << 3) & 0x00780078 | 0x41804180        of pieces of w = 4 bits

are two bfloat16, 16 + a code each: the code is the first bits of a mantissa. So a register of 16 x 128
weights takes three instructions, and its row j is input `each j + p`, where each = 16 / w; x is put in that
order beforehand. What stands for 0, and the 16, is subtracted from the sums of a group.

A high piece of one bit stands in half as many bytes as the low one of two: its numbers of 16 bits are spread
over the words of 32, so that both are put together before the product. The matrix unit then takes each weight
once.

Groups of less than 128 weights: the unit multiplies by 128 at a time, so x has a row for each group of
those, zero at the inputs of the others. Numbers of x that bfloat16 does not hold are sums of some that it
does: x has a row for each of them, and codes are exact.

    grid (columns, tiles of rows)    codes are fetched once, and x where there is one tile of rows
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blocks import blocks
from pallas_kernels.lint import masks
from pallas_kernels.op import Interpret, Unsupported
from pallas_kernels.padding import padded, rounded
from pallas_kernels.quantized_matmul import cost
from pallas_kernels.quantized_matmul.reference import widths

# Bytes of codes and columns of a block at most, and rows of a tile.
BLOCKS = {"bytes": 2**22, "columns": 1024, "rows": 256}
LANES, ROWS, LEAST_GROUP = 128, 16, 16
# Inputs of a product: what the matrix unit takes at a time, or more; and those of a step of the loop.
PRODUCTS, STEPS = (512, 256, LANES), (1024, 512, 256, LANES)
VECTOR_MEMORY = 32 * 2**20
MOST_X = 4 * 2**20
# How many bfloat16 a number is the sum of.
PARTS = {"bfloat16": 1, "float16": 2, "float32": 3}
# The lowest bits of both halves of a word. A bfloat16 has so many bits of a mantissa, and this exponent at 1.
HALVES, MANTISSA, ONE = 0x00010001, 7, 127


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
    planes = [low] if high is None else [low, high]
    plan = _Codes("quantized_matmul", x, scale, widths(bits), bits)
    numbers, sums = plan.arranged(x)  # [m R', K], [R', G]
    columns = scale.shape[1]
    specs = [
        pl.BlockSpec((plan.expanded, x.shape[1]), lambda n, r: (r, 0)),
        pl.BlockSpec((plan.rows, scale.shape[0]), lambda n, r: (r, 0)),
    ]
    arrays = [as_stored(scale), *([] if zero is None else [zero]), *planes]
    specs += [pl.BlockSpec((array.shape[0], plan.columns), lambda n, r: (0, n)) for array in arrays]
    dtype = x.dtype if plan.parts == 1 else jnp.dtype(jnp.float32)
    tiles = numbers.shape[0] // plan.expanded
    ragged = [*(f"in[{2 + i}]" for i in range(len(arrays))), "out[0]"] if columns % plan.columns else []

    def body(x_tile: Any, sums_tile: Any, scale_tile: Any, *others: Any) -> None:
        zeros = others[0] if zero is not None else None
        *codes, out, scales, total = others[zero is not None :]
        plan.body(x_tile, sums_tile, scale_tile, zeros, codes, out, scales, total)

    y = pl.pallas_call(
        body,
        grid=(-(-columns // plan.columns), tiles),
        in_specs=specs,
        out_specs=pl.BlockSpec((plan.rows, plan.columns), lambda n, r: (r, n)),
        out_shape=jax.ShapeDtypeStruct((tiles * plan.rows, columns), dtype),
        scratch_shapes=[
            pltpu.VMEM((scale.shape[0], plan.columns), jnp.float32),
            pltpu.VMEM((plan.rows, plan.columns), jnp.float32),
        ],
        name="quantized_matmul",
        metadata=masks(*ragged),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VECTOR_MEMORY
        ),
        cost_estimate=cost.forward(x, scale, *planes, zero=zero),
        interpret=interpret,
    )(numbers, sums, *arrays)
    return plan.joined(y).astype(x.dtype)


class Blocks:
    """How the arrays are cut, and x arranged.

    Attributes:
      rows: of a tile, with all parts of them.
      expanded: the same with one for each of the `many` groups of a product.
      columns: of a block.
      each: numbers of 16 bits hold as many pieces of the low plane.
      product: inputs that are multiplied at a time.
      step: inputs that are unpacked at a time.
    """

    def __init__(
        self, op: str, x: jax.Array, scale: jax.Array, widths: tuple[int, ...], bits: int, span: int = LANES
    ):
        chosen = blocks(op, f"b{bits}", BLOCKS)
        (self.given, self.inputs), (self.groups, columns) = x.shape, scale.shape[-2:]
        self.parts, self.widths, self.bits = PARTS[x.dtype.name], widths, bits
        self.each = 16 // self.widths[0]
        self.group = self.inputs // self.groups
        self.many = max(span // self.group, 1)
        if self.many * self.group % span or self.group < LEAST_GROUP:
            raise Unsupported(
                f"{op} on TPU takes groups of a multiple of {span} weights, or of {LEAST_GROUP} times a power"
                f" of two, not {self.group}."
            )
        # What is unpacked is a whole number of registers, of 32 bytes, and of products.
        unit = max(32 * 8 // min(self.widths), span)
        if self.inputs % unit:
            raise Unsupported(
                f"{op} on TPU takes a multiple of {unit} inputs at {bits} bits, not {self.inputs}."
            )
        spans = max(self.group, span)
        self.product = next(size for size in PRODUCTS if spans % size == 0)
        self.step = next(
            size
            for size in (*STEPS, self.product)
            if self.inputs % size == 0 and size % unit == 0 and size % self.product == 0
        )
        most = max(chosen["bytes"] // (self.inputs * bits // 8) // LANES, 1) * LANES
        self.columns = min(most, chosen["columns"], rounded(columns, LANES))
        rows = min(chosen["rows"], MOST_X // (2 * self.inputs)) // self.many // ROWS * ROWS
        self.rows = min(max(rows, ROWS), rounded(self.given * self.parts, ROWS))
        self.expanded = self.rows * self.many

    def arranged(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x in the order of the pieces, `[tiles m R', K]` bfloat16, and sums of groups `[tiles R', G]`."""
        rest, parts = x.astype(jnp.float32), []
        for _ in range(self.parts):
            parts.append(rest.astype(jnp.bfloat16))
            rest = rest - parts[-1].astype(jnp.float32)
        rows = padded(jnp.concatenate(parts), 0, self.rows)  # [tiles R', K]
        grouped = rows.reshape(rows.shape[0], self.groups, self.group)
        sums = jnp.sum(grouped, axis=2, dtype=jnp.float32)  # [tiles R', G]
        rows = rows.reshape(-1, 1, self.rows, self.inputs // self.product, self.product)
        if self.many > 1:
            own = np.repeat(np.eye(self.many, dtype=bool), self.group, axis=1)  # [m, 128]
            rows = jnp.where(own[None, :, None, None], rows, 0)  # [tiles, m, R', K / 128, 128]
        # By a product, as TPUs hardly turn arrays whose last axis is short.
        place = np.arange(self.product).reshape(-1, self.each).T.reshape(-1)
        order = np.eye(self.product)[:, place]
        rows = rows.reshape(-1, self.inputs // self.product, self.product)
        turned = jnp.einsum("rck,kj->rcj", rows, jnp.asarray(order, jnp.bfloat16))
        return turned.reshape(-1, self.inputs), sums

    def joined(self, y: jax.Array) -> jax.Array:
        """The rows of x, of which each part has its own."""
        y = y[: self.given * self.parts]
        return y if self.parts == 1 else jnp.sum(y.reshape(self.parts, self.given, -1), axis=0)


class _Codes(Blocks):
    """What a program does."""

    def body(
        self, x: Any, sums: Any, scale: Any, zeros: Any, codes: Any, out: Any, scales: Any, total: Any
    ) -> None:
        scales[...] = as_float(scale[...])
        zero = 2 ** (self.bits - 1) if zeros is None else zeros[...].astype(jnp.int32).astype(jnp.float32)
        # Subtracted first: what the whole numbers of a group are too large by.
        above = scales[...] * (zero + 2**self.bits)  # [G, columns]
        total[...] = -lax.dot(sums[...], above, precision=lax.Precision.HIGHEST)  # [R', columns]

        def step(i: Any, _: None) -> None:
            weights = self.unpacked(i, codes)
            for j in range(self.step // self.product):
                place = i * self.step + j * self.product
                rows = self.product // self.each
                of_product = [piece[j * rows : (j + 1) * rows] for piece in weights]
                part = lax.dot(
                    x[:, pl.ds(pl.multiple_of(place, LANES), self.product)],
                    jnp.concatenate(of_product),
                    preferred_element_type=jnp.float32,
                )  # [m R', columns]
                first = lax.div(place, self.group)
                for m in range(self.many):
                    own = part[m * self.rows : (m + 1) * self.rows]
                    total[...] += own * scales[pl.ds(first + m, 1)]

        lax.fori_loop(0, self.inputs // self.step, step, None)
        out[...] = total[...].astype(out.dtype)

    def unpacked(self, i: Any, codes: list[Any]) -> list[jax.Array]:
        """Codes of a step and 2^bits in bfloat16: `[step / each, columns]` for each place in a number."""

        def of_step(plane: Any, width: int) -> jax.Array:
            size = self.step * width // 8
            return plane[pl.ds(pl.multiple_of(i * size, 32), size)]

        width = self.widths[0]
        words = pltpu.bitcast(of_step(codes[0], width), jnp.int32)  # [step w / 32, columns]
        if len(codes) > 1:
            spread = pltpu.bitcast(of_step(codes[1], 1), jnp.int16).astype(jnp.int32) & 0xFFFF
            spread = (spread | spread << 8) & 0x00FF00FF  # [step / 16, columns]
        base = ((ONE + self.bits) << MANTISSA) * HALVES
        at = MANTISSA - self.bits  # where a code stands
        pieces = []
        for p in range(self.each):
            bits = moved(words, at - p * width) & (((2**width - 1) << at) * HALVES)
            if len(codes) > 1:
                bits |= moved(spread, at + width - p) & (HALVES << at + width)
            pieces.append(pltpu.bitcast(bits | base, jnp.bfloat16))
        return pieces


def as_stored(scale: jax.Array) -> jax.Array:
    """Scales that a kernel can load: there is no float16 in a TPU's registers."""
    return lax.bitcast_convert_type(scale, jnp.int16) if scale.dtype == jnp.float16 else scale


def moved(words: jax.Array, left: int) -> jax.Array:
    """Words shifted to the left, or to the right by less than zero."""
    if left < 0:
        return lax.shift_right_logical(words, jnp.int32(-left))
    return lax.shift_left(words, jnp.int32(left)) if left else words


def as_float(scale: jax.Array) -> jax.Array:
    """Scales in float32; those of float16 come as bits."""
    if scale.dtype != jnp.int16:
        return scale.astype(jnp.float32)
    bits = scale.astype(jnp.int32)
    size = bits & 0x7FFF
    normal = lax.bitcast_convert_type((size << 13) + (112 << 23), jnp.float32)
    small = size.astype(jnp.float32) * 2.0**-24
    size = jnp.where(size < 1 << 10, small, normal)
    return jnp.where(bits < 0, -size, size)
