"""Blocks with a power of two each: codes, and how far they are shifted.

    w ~ 2^s c,    c = round(w / 2^s),    s = ceil( log2( max |w| / C ) ),    C = 2^(b-1) - 1

A block is a tile of `rows x columns` weights. Nothing is clipped, so that an error is at most half a step,
2^(s-1) <= max |w| / C, and a block that is multiplied by a power of two keeps its codes. What enters is
cut into blocks of `rows` numbers in the same way, and products run over blocks, in integers:

    y[r, n] = sum_B 2^(s_a[r, B] + s_w[B, n]) sum_{k in B} a[r, k] c[k, n]

The inner sum is exact in int32, and scaling it by a power of two is exact in float32.

Bits a weight are b + 6 / (rows columns), for shifts of 6 bits: with tiles of 32 x 32 and 4 bits 4.0059, 7.988
times fewer than 32, which is the published figure. The paper's own tile and width of shifts could not be
read; other pairs give the same figure, such as 512 weights and 3 bits.

Dong and Chen, "Blockwise Compression of Transformer-based Models without Retraining", 2023, arXiv:2304.01483.
Embeddings are read by rows from the same tiles; what is between the products is
`effjax.compress.block_functions`.
"""

import dataclasses
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8

from effjax.compress.storage.matrices import Matrices, flat
from effjax.compress.storage.packing import pack, unpack, widths
from effjax.errors import UsageError
from effjax.layers.stored import Place

# Shifts are from -LOWEST on, and stored in so many bits.
LOWEST, SHIFT_BITS = 48, 6


def shifts_for(largest: Float[Array, "*shape"], bits: int) -> Int[Array, "*shape"]:
    """The smallest shifts whose codes hold these numbers; exact, by the exponent of the float."""
    mantissa, exponent = jnp.frexp(largest.astype(jnp.float32) / (2 ** (bits - 1) - 1))
    shift = exponent - (mantissa == 0.5)
    return jnp.clip(jnp.where(largest > 0, shift, -LOWEST), -LOWEST, 2**SHIFT_BITS - 1 - LOWEST)


def power(shift: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
    """2^s in float32."""
    return jnp.ldexp(jnp.ones(shift.shape, jnp.float32), shift.astype(jnp.int32))


@flax.struct.dataclass
class Blocks:
    """Numbers whose last axis is cut into blocks.

    Attributes:
      codes: `[..., n, size]` int8.
      shift: `[..., n]` int32.
    """

    codes: Any
    shift: Any

    def numbers(self) -> Float[Array, "*batch c"]:
        """What the codes stand for."""
        numbers = self.codes.astype(jnp.float32) * power(self.shift)[..., None]
        return numbers.reshape(*numbers.shape[:-2], -1)


def blocked(x: Float[Array, "*batch c"], size: int, bits: int) -> Blocks:
    """Codes and shifts of numbers.

    Args:
      x: the numbers.
      size: of a block along the last axis.
      bits: of a code, 2 to 8.

    Raises:
      UsageError: where blocks do not fill the axis.
    """
    if x.shape[-1] % size:
        raise UsageError(f"blocks of {size} do not fill {x.shape[-1]} channels: give a divisor.")
    parts = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, size)  # [..., n, size]
    shift = shifts_for(jnp.max(jnp.abs(parts), -1), bits)  # [..., n]
    largest = 2 ** (bits - 1) - 1
    codes = jnp.clip(jnp.round(parts / power(shift)[..., None]), -largest, largest)
    return Blocks(codes.astype(jnp.int8), shift)


def block_product(
    a: Blocks, codes: Int8[Array, "n size o"], shift: Int[Array, "n o"]
) -> Float[Array, "*batch o"]:
    """Numbers in blocks times a matrix in blocks, in integers block by block.

    Args:
      a: what enters; its blocks are those of the matrix.
      codes: of the matrix, by blocks of rows.
      shift: of every block of rows, for each column.
    """
    lead = a.codes.shape[:-2]
    rows, of_rows = a.codes.reshape(-1, *a.codes.shape[-2:]), a.shift.reshape(-1, a.shift.shape[-1])
    exact = jax.lax.dot_general(
        rows, codes, (((2,), (1,)), ((1,), (0,))), preferred_element_type=jnp.int32
    )  # [n, R, O]
    scale = power(of_rows.T[:, :, None] + shift[:, None])  # [n, R, O]
    return jnp.sum(exact.astype(jnp.float32) * scale, 0).reshape(*lead, -1)


@flax.struct.dataclass
class ShiftTensor(Matrices):
    """A kernel as codes with shifts.

    Attributes:
      codes: planes `[*front, K width / 8, N]` of bytes.
      shift: planes of the shifts of every tile, packed along the outputs.
      layout: bits and tiles.
      ins: sizes of the axes that are summed over.
      outs: sizes of those of the product.
      turned: whether the array has `outs` before `ins`.
    """

    codes: Any
    shift: Any
    layout: "Shift" = flax.struct.field(pytree_node=False)
    ins: tuple[int, ...] = flax.struct.field(pytree_node=False)
    outs: tuple[int, ...] = flax.struct.field(pytree_node=False)
    turned: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def front(self) -> tuple[int, ...]:
        """Sizes of the axes before those of one kernel."""
        return self.codes[0].shape[:-2]

    def signed(self) -> Int8[Array, "*front k n"]:
        """The codes."""
        codes = unpack(self.codes, self.layout.bits, math.prod(self.ins))
        return (codes.astype(jnp.int32) - 2 ** (self.layout.bits - 1)).astype(jnp.int8)

    def shifts(self) -> Int[Array, "*front tiles n"]:
        """The shift of every block of rows, for each output."""
        columns = math.prod(self.outs)
        held = unpack(self.shift, SHIFT_BITS, -(-columns // self.layout.columns), axis=-1)
        return jnp.repeat(held.astype(jnp.int32) - LOWEST, self.layout.columns, -1)[..., :columns]

    def matrix(self) -> Float[Array, "*front k n"]:
        """All weights as matrices."""
        codes, scale = self.signed().astype(jnp.float32), power(self.shifts())
        tiles = codes.reshape(*codes.shape[:-2], scale.shape[-2], -1, codes.shape[-1])
        return (tiles * scale[..., None, :]).reshape(codes.shape)

    def product(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Maps `[..., *ins]` to `[..., *outs]`, in integers where what enters is in blocks too."""
        lead, rows = x.shape[: x.ndim - len(self.ins)], math.prod(self.ins)
        flat_x = x.reshape(*lead, rows)  # [..., K]
        if self.layout.inputs is None:
            y = flat_x @ self.matrix().astype(x.dtype)  # [..., N]
        else:
            a = blocked(flat_x, self.layout.rows, self.layout.inputs)
            codes = self.signed().reshape(-1, self.layout.rows, math.prod(self.outs))  # [n, rows, N]
            y = block_product(a, codes, self.shifts()).astype(x.dtype)  # [..., N]
        return y.reshape(*lead, *self.outs)

    def entering(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """What enters a convolution, with a shift for all channels of a place."""
        if self.layout.inputs is None:
            return x
        return blocked(x, x.shape[-1], self.layout.inputs).numbers().astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Shift:
    """A layout of tiles with a power of two each.

    Attributes:
      bits: of a code, 2 to 8.
      rows: of a tile, along the axes that are summed over.
      columns: of a tile; the last ones of a matrix may have fewer.
      inputs: bits of what enters, in blocks of `rows`; None leaves it.
    """

    bits: int = 4
    rows: int = 32
    columns: int = 32
    inputs: int | None = 8

    def __post_init__(self) -> None:
        for name in ("bits", "inputs"):
            value = getattr(self, name)
            if value is not None and not 2 <= value <= 8:
                raise UsageError(f"{name}={value} is not from 2 to 8.")
        if self.rows < 1 or self.columns < 1:
            raise UsageError(f"a tile of {self.rows} x {self.columns} weights holds none.")

    def groups(self, rows: int, where: str = "the matrix") -> int:
        """How many tiles there are along `rows` weights.

        Raises:
          UsageError: where tiles do not fill them.
        """
        if rows % self.rows:
            raise UsageError(
                f"rows={self.rows} does not divide the {rows} inputs of {where}: give a divisor, or leave it."
            )
        return rows // self.rows

    def bits_a_weight(self, rows: int, columns: int) -> float:
        """Bits that a weight of such a matrix takes, with its share of the shifts."""
        tiles = self.groups(rows) * -(-columns // self.columns)
        return self.bits + SHIFT_BITS * tiles / (rows * columns)

    def store(self, kernel: Float[Array, "..."], place: Place) -> ShiftTensor:
        """A kernel in this layout."""
        matrix = flat(kernel, place).astype(jnp.float32)  # [.., K, N]
        tiles, front, columns = self.groups(matrix.shape[-2]), place.front, place.matrix[1]
        across = -(-columns // self.columns)
        room = [(0, 0)] * (matrix.ndim - 1) + [(0, across * self.columns - columns)]
        parts = jnp.abs(jnp.pad(matrix, room)).reshape(*front, tiles, self.rows, across, self.columns)
        shift = shifts_for(jnp.max(parts, (-3, -1)), self.bits)  # [.., tiles, across]
        scale = jnp.repeat(
            jnp.repeat(power(shift), self.columns, -1)[..., :columns], self.rows, -2
        )  # [.., K, N]
        largest = 2 ** (self.bits - 1) - 1
        codes = jnp.clip(jnp.round(matrix / scale), -largest, largest) + 2 ** (self.bits - 1)
        held = (shift + LOWEST).astype(jnp.uint8)
        return ShiftTensor(
            pack(codes.astype(jnp.uint8), self.bits),
            pack(held, SHIFT_BITS, axis=-1),
            self,
            place.ins,
            place.outs,
            place.turned,
        )

    def names(self, place: Place) -> ShiftTensor:
        """Names of the axes of what `store` makes."""
        front, own = place.names[: len(place.front)], place.names[len(place.front) :]
        k, n = (own[len(place.outs)], own[0]) if place.turned else (own[0], own[len(place.ins)])
        planes = tuple((*front, k, n) for _ in widths(self.bits))
        shifts = tuple((*front, None, None) for _ in widths(SHIFT_BITS))
        return ShiftTensor(planes, shifts, self, place.ins, place.outs, place.turned)
