"""Weights on a uniform grid: `bits` of a code, and a scale (and a zero) for a group of them.

    w ~ s (c - z),    c = clip( round(w / s) + z, 0, 2^b - 1 )           b bits a code

    affine       s = (max w - min w) / (2^b - 1),   z = round(-min w / s)        with min w <= 0 <= max w
    symmetric    s = max |w| / (2^(b-1) - 1),       z = 2^(b-1), codes from 1 on

A group is `group` weights that follow each other along the axes that are summed over, for one output:
Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference", 2018, arXiv:1806.08342,
section 2. A group of 0 is all weights of one output ("per channel"), of -1 all weights of the matrix ("per
tensor").

What enters may be rounded too: `inputs`, see `effjax.compress.storage.inputs`.

Bits a weight, with scales of 16 bits:  b + 16 / group, and b / group more where it is affine.
"""

import dataclasses
import math
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.compress.storage.input_kinds import KINDS as INPUTS
from effjax.compress.storage.inputs import check_length, integer_product
from effjax.compress.storage.kernels import Implementation, check_bits, quantized_product
from effjax.compress.storage.matrices import Matrices, flat
from effjax.compress.storage.packing import Planes, pack, unpack, widths
from effjax.compress.storage.product import few_rows
from effjax.config import part
from effjax.errors import UsageError
from effjax.layers.stored import Place

# Rows up to which the codes are not unpacked as a whole (on a CPU).
FEW = 4


@flax.struct.dataclass
class QTensor(Matrices):
    """A kernel, or one of every layer or expert, as codes with scales and zeros.

    The fields are annotated `Any` because the same class also carries shapes, names of axes and shardings.

    Attributes:
      codes: planes `[*front, K width / 8, N]` of bytes; K weights are summed over for each of N outputs.
      scale: `[*front, G, N]`, or `[*front, 1, 1]` for all.
      zero: planes of the zeros, packed along the outputs; None where it is the middle of the codes.
      layout: bits and groups.
      ins: sizes of the axes that are summed over.
      outs: sizes of those of the product.
      turned: whether the array has `outs` before `ins`.
      inputs: what is known beforehand of what enters; None where it is not rounded, or nothing needs to be.
    """

    codes: Any
    scale: Any
    zero: Any
    layout: "Uniform" = flax.struct.field(pytree_node=False)
    ins: tuple[int, ...] = flax.struct.field(pytree_node=False)
    outs: tuple[int, ...] = flax.struct.field(pytree_node=False)
    turned: bool = flax.struct.field(pytree_node=False, default=False)
    inputs: Any = None

    @property
    def front(self) -> tuple[int, ...]:
        """Sizes of the axes before those of one kernel."""
        return self.scale.shape[:-2]

    def zeros(self) -> Float[Array, "*front g n"] | float:
        """The code that stands for 0 in every group, in float32."""
        if self.zero is None:
            return float(2 ** (self.layout.bits - 1))
        count = math.prod(self.outs) if self.layout.group >= 0 else 1
        return unpack(self.zero, self.layout.bits, count, axis=-1).astype(jnp.float32)

    def matrix(self) -> Float[Array, "*front k n"]:
        """All weights as matrices, in float32."""
        return self._decoded(self.codes, self.scale, self.zeros())

    def _decoded(
        self, planes: Planes, scale: Float[Array, "*front g n2"], zero: Float[Array, "*front g n2"] | float
    ) -> Float[Array, "*front k n"]:
        codes = unpack(planes, self.layout.bits, math.prod(self.ins)).astype(jnp.float32)  # [.., K, N]
        grouped = codes.reshape(*codes.shape[:-2], scale.shape[-2], -1, codes.shape[-1])  # [.., G, K / G, N]
        zero = zero if isinstance(zero, float) else zero[..., None, :]
        return ((grouped - zero) * scale.astype(jnp.float32)[..., None, :]).reshape(codes.shape)

    def take(self, rows: Int[Array, "*n"]) -> Float[Array, "*n c"]:
        """Rows of a table, in the dtype of the scales; float16 is for storing, and becomes float32."""
        at, zero = rows.reshape(-1), self.zeros()
        planes = tuple(jnp.take(plane, at, axis=-1) for plane in self.codes)  # [K / each, n]
        shared = self.layout.group < 0
        scale = self.scale if shared else jnp.take(self.scale, at, axis=-1)
        zero = zero if shared or isinstance(zero, float) else jnp.take(zero, at, axis=-1)
        dtype = jnp.float32 if self.scale.dtype == jnp.float16 else self.scale.dtype
        return self._decoded(planes, scale, zero).T.reshape(*rows.shape, -1).astype(dtype)

    def product(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Maps `[..., *ins]` to `[..., *outs]`."""
        lead = x.shape[: x.ndim - len(self.ins)]
        x, many = x.reshape(*lead, math.prod(self.ins)), _many  # [..., K]
        if self.layout.inputs is not None and self.layout.inputs.integers:
            few, many = _few_rounded, _integers
        elif self.layout.inputs is not None:
            x, few = self.layout.inputs.rounded(x, self.inputs), _few
        else:
            few = _few
        rows = x.reshape(-1, x.shape[-1])  # [R, K]
        if self.layout.implementation != "plain":
            y = self._by_kernel(rows)
        elif rows.shape[0] <= FEW:
            y = jax.lax.platform_dependent(rows, self, cpu=few, default=many)
        else:
            y = many(rows, self)  # [R, N]
        return y.reshape(*lead, *self.outs)

    def _by_kernel(self, rows: Float[Array, "r k"]) -> Float[Array, "r n"]:
        zero, count = self.zero, self.scale.shape[1]
        zero = None if zero is None else unpack(zero, self.layout.bits, count, axis=-1)  # [G, N]
        return quantized_product(
            rows, self.codes, self.layout.bits, self.scale, zero, self.layout.implementation
        )

    def entering(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """What enters, rounded."""
        return x if self.layout.inputs is None else self.layout.inputs.rounded(x, self.inputs)


def _many(rows: Float[Array, "r k"], kernel: QTensor) -> Float[Array, "r n"]:
    return rows @ kernel.matrix().astype(rows.dtype)


def _few(rows: Float[Array, "r k"], kernel: QTensor) -> Float[Array, "r n"]:
    zero, shape = kernel.zeros(), (kernel.scale.shape[0], math.prod(kernel.outs))
    scale = jnp.broadcast_to(kernel.scale, shape)
    zero = zero if isinstance(zero, float) else jnp.broadcast_to(zero, shape)
    return few_rows(rows, kernel.codes, kernel.layout.bits, scale, zero).astype(rows.dtype)


def _few_rounded(rows: Float[Array, "r k"], kernel: QTensor) -> Float[Array, "r n"]:
    return _few(kernel.layout.inputs.rounded(rows, kernel.inputs), kernel)


def _integers(rows: Float[Array, "r k"], kernel: QTensor) -> Float[Array, "r n"]:
    layout, groups = kernel.layout, kernel.scale.shape[0]
    check_length(rows.shape[1], groups)
    a, a_scale, a_zero = layout.inputs.codes(rows, kernel.inputs)
    zero = jnp.broadcast_to(kernel.zeros(), (groups, math.prod(kernel.outs))).astype(jnp.int32)
    codes = unpack(kernel.codes, layout.bits, rows.shape[1])  # [K, N]
    a, a_zero = a.astype(jnp.int8), a_zero.astype(jnp.int32)
    scale, size = kernel.scale.astype(jnp.float32), rows.shape[1] // groups

    def add(y: Float[Array, "r n"], group: Array) -> tuple[Float[Array, "r n"], None]:
        """One group more: all at once would hold R x N sums for each."""
        own = jax.lax.dynamic_slice_in_dim(a, group * size, size, 1)  # [R, K / G]
        part = jax.lax.dynamic_slice_in_dim(codes, group * size, size)  # [K / G, N]
        exact = integer_product(own, a_zero, part, zero[group][None], layout.bits)[0]  # [R, N]
        return y + exact.astype(jnp.float32) * scale[group][None], None

    start = jnp.zeros((rows.shape[0], codes.shape[1]), jnp.float32)
    y, _ = jax.lax.scan(add, start, jnp.arange(groups))
    return (y * a_scale).astype(rows.dtype)


@dataclasses.dataclass(frozen=True)
class Uniform:
    """A layout of codes.

    Attributes:
      bits: of a code, 1 to 8; symmetric ones have at least 2.
      group: weights that share a scale; 0 for all of an output, -1 for all of the matrix.
      symmetric: whether codes lie evenly on both sides of 0.
      scale: dtype of the scales.
      inputs: how what enters is rounded, a kind in `effjax.compress.storage.input_kinds`; None leaves it.
      implementation: of the product, see `effjax.compress.storage.kernels`.
    """

    bits: int = 4
    group: int = 128
    symmetric: bool = True
    scale: Literal["float32", "float16", "bfloat16"] = "float16"
    inputs: Any = part(INPUTS, default=None)
    implementation: Implementation = "plain"

    def __post_init__(self) -> None:
        widths(self.bits)
        check_bits(self.bits, self.implementation)
        if self.implementation != "plain" and self.inputs is not None and self.inputs.integers:
            raise UsageError(
                f"implementation={self.implementation!r} multiplies by numbers, inputs={self.inputs!r} by "
                f"integers: give implementation='plain'."
            )
        if self.group < -1:
            raise UsageError(f"group={self.group}: give a number of weights, 0 for an output, -1 for all.")
        if self.symmetric and self.bits < 2:
            raise UsageError(f"bits={self.bits} leave a symmetric grid nothing but 0: give symmetric=False.")

    @property
    def levels(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def lowest(self) -> int:
        """The smallest code that is used."""
        return 1 if self.symmetric else 0

    def groups(self, rows: int, where: str = "the matrix") -> int:
        """How many groups there are along `rows` weights.

        Raises:
          UsageError: where a group does not divide them.
        """
        if self.group <= 0:
            return 1
        if rows % self.group:
            divisors = [g for g in (16, 32, 64, 128, 256) if rows % g == 0] or [rows]
            raise UsageError(
                f"group={self.group} does not divide the {rows} inputs of {where}: give a divisor, such as "
                f"{', '.join(map(str, divisors))}, or 0 for one scale an output."
            )
        return rows // self.group

    def bits_a_weight(self, rows: int, columns: int) -> float:
        """Bits that a weight of such a matrix takes, with its share of scales and zeros."""
        scales = self.groups(rows) * (columns if self.group >= 0 else 1)
        own = jnp.dtype(self.scale).itemsize * 8 + (0 if self.symmetric else self.bits)
        return self.bits + own * scales / (rows * columns)

    def fit(
        self, matrix: Float[Array, "*front k n"], where: str = "the matrix"
    ) -> tuple[Float[Array, "*front g n2"], Float[Array, "*front g n2"]]:
        """Scales and zeros by the smallest and the largest weight of every group."""
        parts, axes = self.parted(matrix, where)
        return self.grid(jnp.min(parts, axes), jnp.max(parts, axes))

    def grid(
        self, low: Float[Array, "*shape"], high: Float[Array, "*shape"]
    ) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
        """Scale and zero of a grid from `low` to `high`, in float32 and of the values that are stored."""
        low, high = jnp.minimum(low.astype(jnp.float32), 0.0), jnp.maximum(high.astype(jnp.float32), 0.0)
        if self.symmetric:
            scale = jnp.maximum(-low, high) / (2 ** (self.bits - 1) - 1)
        else:
            scale = (high - low) / self.levels
        # What is stored has few bits itself; a scale of 0 would lose its group, and belongs to zeros alone.
        scale = scale.astype(self.scale).astype(jnp.float32)
        scale = jnp.where(scale == 0, 1.0, scale)
        if self.symmetric:
            return scale, jnp.full_like(scale, 2 ** (self.bits - 1))
        return scale, jnp.clip(jnp.round(-low / scale), 0, self.levels)

    def parted(
        self, matrix: Float[Array, "*front k n"], where: str = "the matrix"
    ) -> tuple[Float[Array, "..."], tuple[int, ...]]:
        """The weights by group, `[*front, G, K / G, N]`, and the axes of a group; see `fit`."""
        rows = matrix.shape[-2]
        groups = self.groups(rows, where)
        if self.group < 0:
            return matrix[..., None, None], (-4, -3)
        return matrix.reshape(*matrix.shape[:-2], groups, rows // groups, matrix.shape[-1]), (-2,)

    def codes(
        self,
        matrix: Float[Array, "*front k n"],
        scale: Float[Array, "*front g n2"],
        zero: Float[Array, "*front g n2"],
    ) -> Float[Array, "*front k n"]:
        """Codes as floats, to the nearest; halves to even."""
        rows = matrix.shape[-2]
        parts = matrix.reshape(*matrix.shape[:-2], scale.shape[-2], -1, matrix.shape[-1])
        codes = jnp.round(parts / scale[..., None, :]) + zero[..., None, :]
        codes = jnp.clip(codes, self.lowest, self.levels)
        return codes.reshape(*matrix.shape[:-2], rows, matrix.shape[-1])

    def encode(
        self,
        matrix: Float[Array, "*front k n"],
        place: Place,
        scale: Float[Array, "*front g n2"] | None = None,
        zero: Float[Array, "*front g n2"] | None = None,
    ) -> QTensor:
        """Rounds matrices to the nearest codes.

        Args:
          matrix: the weights.
          place: the kernel that they are.
          scale: as `fit` gives them, or otherwise found; None fits them.
          zero: likewise.
        """
        matrix = matrix.astype(jnp.float32)
        if scale is None or zero is None:
            scale, zero = self.fit(matrix)
        codes = self.codes(matrix, scale, zero).astype(jnp.uint8)
        return self.held(codes, scale, zero, place)

    def held(
        self,
        codes: Array,
        scale: Float[Array, "*front g n2"],
        zero: Float[Array, "*front g n2"],
        place: Place,
    ) -> QTensor:
        """What holds these codes."""
        planes: Planes | None = None
        if not self.symmetric:
            planes = pack(zero.astype(jnp.uint8), self.bits, axis=-1)
        return QTensor(
            codes=pack(codes, self.bits),
            scale=scale.astype(self.scale),
            zero=planes,
            layout=self,
            ins=place.ins,
            outs=place.outs,
            turned=place.turned,
            inputs=None if self.inputs is None else self.inputs.unknown(place.front, place.matrix[0]),
        )

    def store(self, kernel: Float[Array, "..."], place: Place) -> QTensor:
        """A kernel in this layout."""
        return self.encode(flat(kernel, place), place)

    def names(self, place: Place) -> QTensor:
        """Names of the axes of what `store` makes."""
        front = place.names[: len(place.front)]
        own = place.names[len(place.front) :]
        outs, ins = (own[: len(place.outs)], own[len(place.outs) :]) if place.turned else (
            own[len(place.ins) :], own[: len(place.ins)]
        )  # fmt: skip
        k, n = ins[0], outs[0]  # a flattened axis is cut as its first, which is the outermost
        planes = tuple((*front, k, n) for _ in widths(self.bits))
        # Scales are few: along the inputs they lie whole.
        scales = (*front, None, n if self.group >= 0 else None)
        zeros = None if self.symmetric else tuple((*front, None, None) for _ in widths(self.bits))
        inputs = None if self.inputs is None else self.inputs.names(tuple(front))
        return QTensor(planes, scales, zeros, self, place.ins, place.outs, place.turned, inputs)
