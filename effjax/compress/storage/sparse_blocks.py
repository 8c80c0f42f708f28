"""Kernels of which whole blocks are zero, stored without them: block compressed sparse columns.

    W [K, N] falls into blocks of (k, n): k inputs by n outputs.   A share `sparsity` of them is zero.

    values [B, k, n]     the blocks that stay, by their place along the outputs, then along the inputs
    inputs [B]           which inputs a block has
    starts [N/n + 1]     which blocks an output has: those from starts[j] to starts[j + 1] - 1

    y[.., j] = sum_{starts[j] <= b < starts[j + 1]} x[.., inputs[b]] values[b]

Shen et al. 2023, "An Efficient Sparse Inference Software Accelerator for Transformer-based Language Models on
CPUs", arXiv:2306.16601, and the notes on kernels in the authors' repository: blocks of one input by four
outputs, the default here, because four of them beside each other fill an instruction that sums four products
of 8 bits. The authors write weights to the left of what enters and call the block 4x1. They fill rows up to a
multiple of four blocks, which no instruction here asks for.

With `values="int8"` and `inputs` a kind of `effjax.compress.storage.input_kinds`, blocks are multiplied as
integers: the sum over a column is one of integers, exact in int32, and scaled once at the end. Without
`inputs`, int8 values are scaled first.

A matrix unit skips nothing smaller than its own tile, and gathers cost more than products: where the blocks
that stay are more than `dense_above` of all, by default more than `break_even` says, the matrix is put
together and multiplied whole. Blocks that are as large as that tile, 128 by 128, have a kernel on TPUs
(`implementation="kernel"`), which reads them alone.

Bits a weight: (1 - sparsity) (v + 16 / (k n)), and the starts.
"""

import dataclasses
import math
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from effjax.compress.storage.input_kinds import KINDS as INPUTS
from effjax.compress.storage.inputs import check_length
from effjax.compress.storage.kernels import Implementation, sparse_block_product
from effjax.compress.storage.matrices import Matrices, flat, in_blocks
from effjax.config import part
from effjax.errors import UsageError
from effjax.layers.stored import Place

Values = Literal["float32", "bfloat16", "int8"]
# What the kernel's blocks are multiples of.
TILE = 128


@flax.struct.dataclass
class SparseBlocksTensor(Matrices):
    """A kernel, or one of every layer or expert, as the blocks that are not zero.

    The fields are annotated `Any` because the same class also carries shapes, names of axes and shardings.

    Attributes:
      values: `[*front, B, k, n]`.
      inputs: `[*front, B]` of 16 bits, of 32 where there are more than 65,536 rows of blocks.
      starts: `[*front, N / n + 1]`.
      scale: `[*front, N]` of int8 values; None of others.
      layout: blocks and how many stay.
      ins: sizes of the axes that are summed over.
      outs: sizes of those of the product.
      turned: whether the array has `outs` before `ins`.
      known: what is known beforehand of what enters; None where it is not rounded, or nothing needs to be.
    """

    values: Any
    inputs: Any
    starts: Any
    scale: Any
    layout: "SparseBlocks" = flax.struct.field(pytree_node=False)
    ins: tuple[int, ...] = flax.struct.field(pytree_node=False)
    outs: tuple[int, ...] = flax.struct.field(pytree_node=False)
    turned: bool = flax.struct.field(pytree_node=False, default=False)
    known: Any = None

    @property
    def front(self) -> tuple[int, ...]:
        """Sizes of the axes before those of one kernel."""
        return tuple(self.inputs.shape[:-1])

    def matrix(self) -> Float[Array, "*front k n"]:
        """All weights as matrices, in float32."""
        whole = self._spread
        for _ in self.front:
            whole = jax.vmap(whole)
        matrix: Array = whole(self.values, self.inputs, self.starts)
        if self.scale is not None:
            matrix = matrix.astype(jnp.float32) * self.scale[..., None, :].astype(jnp.float32)
        return matrix.astype(jnp.float32)

    def _spread(self, values: Array, inputs: Integer[Array, "b"], starts: Integer[Array, "j"]) -> Array:
        k, n = self.layout.block
        rows, columns = math.prod(self.ins) // k, math.prod(self.outs) // n
        zeros = jnp.zeros((rows, columns, k, n), values.dtype)
        spread = zeros.at[inputs.astype(jnp.int32), columns_of(starts, inputs.shape[0])].set(values)
        return spread.transpose(0, 2, 1, 3).reshape(rows * k, columns * n)  # [K, N]

    def product(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Maps `[..., *ins]` to `[..., *outs]`, in the dtype of x."""
        lead = x.shape[: x.ndim - len(self.ins)]
        rows = x.reshape(-1, math.prod(self.ins))  # [R, K]
        whole = self.layout.multiplied_whole(rows.shape[0])
        if self.layout.values == "int8" and self.layout.inputs is not None:
            y = self._integers(rows, whole)
        elif whole:
            y = rows @ self.matrix().astype(rows.dtype)
        elif self.layout.implementation != "plain":
            y = self._by_kernel(rows)
        else:
            values = self.values
            if self.scale is not None:
                of_block = self.scale.reshape(-1, self.layout.block[1])  # [N / n, n]
                of_block = of_block[columns_of(self.starts, values.shape[0])]  # [B, n]
                values = values.astype(jnp.float32) * of_block[:, None].astype(jnp.float32)
            y = block_product(rows, values.astype(rows.dtype), self.inputs, self.starts)
        return y.astype(x.dtype).reshape(*lead, *self.outs)

    def _by_kernel(self, rows: Float[Array, "r k"]) -> Float[Array, "r n"]:
        values = self.values if self.scale is not None else self.values.astype(rows.dtype)
        y = sparse_block_product(rows, values, self.inputs, self.starts, self.layout.implementation)
        return y if self.scale is None else y.astype(jnp.float32) * self.scale[None].astype(jnp.float32)

    def _integers(self, rows: Float[Array, "r k"], as_whole: bool) -> Float[Array, "r n"]:
        check_length(rows.shape[1], 1)
        a, a_scale, a_zero = self.layout.inputs.codes(rows, self.known)
        # Both are small integers, and so is their difference: of 9 bits, which no int8 holds.
        a = (a - a_zero).astype(jnp.int16)  # [R, K]
        if as_whole:
            whole = self._spread(self.values, self.inputs, self.starts)  # [K, N]
            exact = jax.lax.dot(a, whole, preferred_element_type=jnp.int32)
        else:
            exact = block_product(a, self.values, self.inputs, self.starts)  # [R, N]
        return exact.astype(jnp.float32) * a_scale * self.scale[None].astype(jnp.float32)

    def entering(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """What enters, rounded."""
        return x if self.layout.inputs is None else self.layout.inputs.rounded(x, self.known)


def columns_of(starts: Integer[Array, "j"], blocks: int) -> Integer[Array, "b"]:
    """The column of every block."""
    lengths = jnp.diff(starts.astype(jnp.int32))
    return jnp.repeat(jnp.arange(lengths.shape[0]), lengths, total_repeat_length=blocks)


def block_product(
    x: Array, values: Array, inputs: Integer[Array, "b"], starts: Integer[Array, "ends"]
) -> Array:
    """x W of the blocks alone; sums of integers are int32.

    Args:
      x: `[R, K]`, of floats or of integers.
      values: `[B, k, n]`.
      inputs: the row of every block.
      starts: the first block of every column.

    Returns:
      `[R, N]`.
    """
    blocks, k, n = values.shape
    total = jnp.int32 if jnp.issubdtype(values.dtype, jnp.integer) else x.dtype
    turned = x.T.reshape(-1, k, x.shape[0])  # [K / k, k, R]: a row of it is read as a whole
    taken = turned[inputs.astype(jnp.int32)]  # [B, k, R]
    parts = jnp.einsum("bkn,bkr->bnr", values, taken, preferred_element_type=total)  # [B, n, R]
    columns = starts.shape[0] - 1
    summed = jax.ops.segment_sum(
        parts, columns_of(starts, blocks), num_segments=columns, indices_are_sorted=True
    )  # [N / n, n, R]
    return summed.reshape(columns * n, x.shape[0]).T


def break_even(block: tuple[int, int], rows: int) -> float:
    """The density at which gathering blocks takes as long as putting the matrix together.

    Measured on two cores of a CPU with a matrix of 768 by 3072 in float32, at densities from 0.05 to 1 and 1,
    32 and 128 rows. A single row is always faster by blocks. Several rows are so below 0.38 to 0.6 for blocks
    of 64 by 64 and 128 by 128, below 0.08 to 0.15 for those of 16 by 16, and not at 0.05 for those of 1 by 4.
    """
    if rows == 1:
        return 1.0
    numbers = math.prod(block)
    if numbers >= 64 * 64:
        return 0.4
    return 0.08 if numbers >= 16 * 16 else 0.0


@dataclasses.dataclass(frozen=True)
class SparseBlocks:
    """A layout of blocks that are not zero.

    Attributes:
      sparsity: share of the blocks of each matrix that are zero: those that are smallest.
      block: inputs and outputs of a block.
      values: dtype of what stays; int8 has a scale for every output.
      inputs: how what enters int8 values is rounded; None leaves it.
      dense_above: the density above which the matrix is multiplied whole; None for that of `break_even`, and
        never where a kernel is asked for.
      implementation: of the product, see `effjax.compress.storage.kernels`.
    """

    sparsity: float = 0.8
    block: tuple[int, int] = (1, 4)
    values: Values = "float32"
    inputs: Any = part(INPUTS, default=None)
    dense_above: float | None = None
    implementation: Implementation = "plain"

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise UsageError(f"sparsity={self.sparsity} is a share from 0 to below 1.")
        if min(self.block) < 1:
            raise UsageError(f"block={self.block} has inputs and outputs, of which each is at least 1.")
        if self.inputs is not None and not (self.values == "int8" and self.inputs.integers):
            raise UsageError(
                f"inputs={self.inputs!r} with values={self.values!r}: integers are multiplied by integers. "
                "Give values='int8' and inputs of kind 'token', 'tensor' or 'static', or no inputs."
            )
        if self.implementation != "plain" and self.inputs is not None:
            raise UsageError(
                f"implementation={self.implementation!r} multiplies by numbers, inputs={self.inputs!r} by "
                f"integers: give implementation='plain'."
            )
        if self.implementation != "plain" and any(side % TILE for side in self.block):
            raise UsageError(
                f"implementation={self.implementation!r} takes blocks of multiples of {TILE}, not "
                f"{self.block}: give implementation='plain'."
            )

    @property
    def density(self) -> float:
        """Share of the blocks that stay."""
        return 1 - self.sparsity

    def multiplied_whole(self, rows: int) -> bool:
        """Whether a product with so many rows is one with all numbers of the matrix."""
        if self.dense_above is not None:
            return self.density > self.dense_above
        return self.implementation == "plain" and self.density > break_even(self.block, rows)

    def groups(self, rows: int, where: str = "the matrix") -> int:
        """One scale for all inputs."""
        del rows, where
        return 1

    def kept(self, rows: int, columns: int) -> int:
        """How many blocks of a matrix stay: at least one."""
        blocks = (rows // self.block[0]) * (columns // self.block[1])
        return max(1, blocks - round(self.sparsity * blocks))

    def bits_a_weight(self, rows: int, columns: int) -> float:
        """Bits that a weight takes, with its share of indices and scales."""
        k, n = self.block
        own = jnp.dtype(self.values).itemsize * 8 * k * n + jnp.dtype(self._index(rows)).itemsize * 8
        scales = 32 * columns if self.values == "int8" else 0
        return (self.kept(rows, columns) * own + 32 * (columns // n + 1) + scales) / (rows * columns)

    def _index(self, rows: int) -> Any:
        return jnp.uint16 if rows // self.block[0] <= 2**16 else jnp.uint32

    def store(self, kernel: Float[Array, "..."], place: Place) -> SparseBlocksTensor:
        """A kernel with its largest blocks: those of the largest mean of magnitudes.

        Raises:
          UsageError: where blocks do not divide it.
        """
        matrix = flat(kernel, place).astype(jnp.float32)  # [.., K, N]
        parted = in_blocks(matrix, self.block, place.path)  # [.., K / k, k, N / n, n]
        *front, high, k, wide, n = parted.shape
        worth = jnp.mean(jnp.abs(parted), (-3, -1))  # [.., K / k, N / n]
        by_column = jnp.swapaxes(worth, -1, -2).reshape(*front, -1)  # [.., N / n * K / k]
        _, at = jax.lax.top_k(by_column, self.kept(*place.matrix))
        at = jnp.sort(at, -1)  # [.., B]
        column, row = at // high, at % high
        starts = jax.vmap(jnp.searchsorted, (0, None))(
            column.reshape(-1, column.shape[-1]), jnp.arange(wide + 1)
        ).reshape(*front, wide + 1)
        blocks = jnp.moveaxis(parted, -2, len(front)).reshape(*front, wide * high, k, n)
        values = jnp.take_along_axis(blocks, at[..., None, None], len(front))  # [.., B, k, n]
        scale = None
        if self.values == "int8":
            largest = jnp.max(jnp.abs(matrix), -2)  # [.., N]
            scale = jnp.where(largest == 0, 1.0, largest / 127)
            of_block = jnp.take_along_axis(scale.reshape(*front, wide, n), column[..., None], len(front))
            values = jnp.round(values / of_block[..., None, :])
        known = None if self.inputs is None else self.inputs.unknown(place.front, place.matrix[0])
        return SparseBlocksTensor(
            values=values.astype(self.values),
            inputs=row.astype(self._index(place.matrix[0])),
            starts=starts.astype(jnp.int32),
            scale=scale,
            layout=self,
            ins=place.ins,
            outs=place.outs,
            turned=place.turned,
            known=known,
        )

    def names(self, place: Place) -> SparseBlocksTensor:
        """Names of the axes of what `store` makes: blocks lie whole on every device."""
        front = tuple(place.names[: len(place.front)])
        scale = (*front, None) if self.values == "int8" else None
        known = None if self.inputs is None else self.inputs.names(front)
        return SparseBlocksTensor(
            (*front, None, None, None), (*front, None), (*front, None), scale, self,
            place.ins, place.outs, place.turned, known,
        )  # fmt: skip
