"""Kernels as matrices: what is summed over along the rows, the product's axes along the columns."""

from typing import Any

import flax.struct
from jaxtyping import Array, DTypeLike, Float

from effjax.errors import UsageError
from effjax.layers.stored import Place, Stored


class Matrices(Stored):
    """The base of kernels that are stored as matrices: pytrees with these fields and a `matrix`.

    Attributes:
      layout: how they are stored.
      ins: sizes of the axes that are summed over.
      outs: sizes of those of the product.
      turned: whether the array has `outs` before `ins`.
    """

    layout: Any
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    turned: bool

    @property
    def front(self) -> tuple[int, ...]:
        """Sizes of the axes before those of one kernel (layers, experts)."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        own = self.outs + self.ins if self.turned else self.ins + self.outs
        return (*self.front, *own)

    def matrix(self) -> Float[Array, "*front k n"]:
        """All weights as matrices, in float32."""
        raise NotImplementedError

    def whole(self, dtype: DTypeLike) -> Float[Array, "..."]:
        """The array."""
        return unflat(self.matrix().astype(dtype), self.ins, self.outs, self.turned)


@flax.struct.dataclass
class FloatKernel(Stored):
    """The base of kernels that stay float arrays of their own shape.

    Attributes:
      kernel: the array.
      layout: how it is used.
      ins: sizes of the axes that are summed over.
      outs: sizes of those of the product.
      turned: whether the array has `outs` before `ins`.
    """

    kernel: Any
    layout: Any = flax.struct.field(pytree_node=False)
    ins: tuple[int, ...] = flax.struct.field(pytree_node=False)
    outs: tuple[int, ...] = flax.struct.field(pytree_node=False)
    turned: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return tuple(self.kernel.shape)

    @property
    def place(self) -> Place:
        """The kernel in a tree, its axes without names."""
        return Place(self.shape, (None,) * len(self.shape), self.ins, self.outs, self.turned)

    def matrix(self) -> Float[Array, "*front k n"]:
        """The numbers that are used, as matrices."""
        return flat(self.kernel, self.place)

    def whole(self, dtype: DTypeLike) -> Float[Array, "..."]:
        """The array of the numbers that are used."""
        return unflat(self.matrix().astype(dtype), self.ins, self.outs, self.turned)

    def product(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Maps `[..., *ins]` to `[..., *outs]`, in the dtype of x."""
        matrix = self.matrix().astype(x.dtype)  # [K, N]
        lead = x.shape[: x.ndim - len(self.ins)]
        return (x.reshape(*lead, matrix.shape[0]) @ matrix).reshape(*lead, *self.outs)


def flat(kernel: Float[Array, "..."], place: Place) -> Float[Array, "*front k n"]:
    """The matrices of a kernel."""
    front, k, n = len(place.front), len(place.ins), len(place.outs)
    if place.turned:
        order = (*range(front), *range(front + n, front + n + k), *range(front, front + n))
        kernel = kernel.transpose(order)
    return kernel.reshape(*place.front, *place.matrix)


def in_blocks(
    matrix: Float[Array, "*front k n"], block: tuple[int, int], where: str = "the matrix"
) -> Float[Array, "*front high k2 wide n2"]:
    """The blocks of so many inputs and outputs that matrices fall into.

    Raises:
      UsageError: where they do not divide.
    """
    (rows, columns), (k, n) = matrix.shape[-2:], block
    if rows % k or columns % n:
        raise UsageError(
            f"{where or 'the matrix'} has {rows} inputs and {columns} outputs, which blocks of {k} by {n} do "
            "not divide: give another block, or leave it out."
        )
    return matrix.reshape(*matrix.shape[:-2], rows // k, k, columns // n, n)


def unflat(
    matrix: Float[Array, "*front k n"], ins: tuple[int, ...], outs: tuple[int, ...], turned: bool
) -> Float[Array, "..."]:
    """The kernel of matrices."""
    front = matrix.shape[:-2]
    kernel = matrix.reshape(*front, *ins, *outs)
    if not turned:
        return kernel
    a, k, n = len(front), len(ins), len(outs)
    return kernel.transpose(*range(a), *range(a + k, a + k + n), *range(a, a + k))
