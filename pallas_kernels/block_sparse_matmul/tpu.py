"""The product by Mosaic TPU: blocks pass in their order, a group at a time, and sums of all columns stay.

A group is so many blocks as lie behind each other in memory, of whatever columns: none is filled up. A
program is told as scalars which inputs and which column each block has. It multiplies several blocks first,
which do not wait for each other, and then adds them to their columns one by one.

    grid (tiles of rows, groups)     x and the sums of a tile stay, blocks pass once for each tile
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse_matmul import cost
from pallas_kernels.block_sparse_matmul.reference import columns_of
from pallas_kernels.blocks import blocks
from pallas_kernels.lint import masks
from pallas_kernels.op import Interpret, Unsupported
from pallas_kernels.padding import padded, rounded

# Blocks of a group, and rows of a tile, at most.
BLOCKS = {"blocks": 64, "rows": 128}
DTYPES = ("bfloat16", "float32")
LANES, ROWS = 128, 16
# Numbers of sums that are on their way: half of the registers.
WAITING = 32 * 1024
VECTOR_MEMORY = 48 * 2**20
# What x and the sums of a tile may take, twice each, as the next ones come meanwhile.
MOST_HELD = 24 * 2**20


def forward(
    x: jax.Array, values: jax.Array, inputs: jax.Array, starts: jax.Array, *, interpret: Interpret
) -> jax.Array:
    """As the reference."""
    plan = _Plan(x, values, starts)
    rows = padded(x, 0, plan.rows)  # [tiles R', K]
    _, k, n = values.shape
    y = pl.pallas_call(
        plan.body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(rows.shape[0] // plan.rows, plan.groups),
            in_specs=[
                pl.BlockSpec((plan.rows, x.shape[1]), lambda r, g, *_: (r, 0)),
                pl.BlockSpec((plan.group, k, n), lambda r, g, *_: (g, 0, 0)),
            ],
            out_specs=pl.BlockSpec((plan.rows, plan.columns), lambda r, g, *_: (r, 0)),
        ),
        out_shape=jax.ShapeDtypeStruct((rows.shape[0], plan.columns), jnp.float32),
        name="block_sparse_matmul",
        metadata=plan.ragged(),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VECTOR_MEMORY
        ),
        cost_estimate=cost.forward(x, values, inputs, starts),
        interpret=interpret,
    )(inputs, columns_of(starts, plan.blocks), rows, values)
    return y[: x.shape[0]].astype(x.dtype)


class _Plan:
    """How the arrays are cut, and what a program does.

    Attributes:
      blocks: that there are.
      group: blocks of a group, of which the last may have fewer.
      groups: that they make.
      rows: of a tile.
      columns: of the product.
      together: blocks that are multiplied before they are added.
    """

    def __init__(self, x: jax.Array, values: jax.Array, starts: jax.Array):
        if x.dtype.name not in DTYPES:
            raise Unsupported(f"block_sparse_matmul on TPU takes {' or '.join(DTYPES)}, and x is {x.dtype}.")
        self.blocks, self.k, self.n = values.shape
        if self.k % LANES or self.n % LANES:
            raise Unsupported(
                f"block_sparse_matmul on TPU takes blocks of multiples of {LANES} inputs and outputs, not"
                f" {self.k} by {self.n}."
            )
        chosen = blocks("block_sparse_matmul", values.dtype.name, BLOCKS)
        self.columns = (starts.shape[0] - 1) * self.n
        held = 2 * (x.shape[1] * x.dtype.itemsize + self.columns * 4)
        if held * ROWS > VECTOR_MEMORY:
            raise Unsupported(
                f"block_sparse_matmul on TPU holds {ROWS} rows of x and of the product, and {x.shape[1]}"
                f" inputs and {self.columns} outputs are too many: cut the matrix."
            )
        rows = max(min(chosen["rows"], MOST_HELD // held // ROWS * ROWS), ROWS)
        self.rows = min(rows, rounded(x.shape[0], ROWS))
        self.group = min(chosen["blocks"], self.blocks)
        self.groups = -(-self.blocks // self.group)
        self.together = max(WAITING // (self.rows * self.n), 1)

    def ragged(self) -> Any:
        """What the lint is told: of the last group only those blocks are read that there are."""
        return masks("in[1]") if self.blocks % self.group else None

    def body(self, inputs: Any, column: Any, x: Any, values: Any, out: Any) -> None:
        g = pl.program_id(1)

        @pl.when(g == 0)
        def _() -> None:
            out[...] = jnp.zeros_like(out)

        left = self.blocks % self.group
        if left:
            pl.when(g < self.groups - 1)(lambda: self.add(self.group, inputs, column, x, values, out))
            pl.when(g == self.groups - 1)(lambda: self.add(left, inputs, column, x, values, out))
        else:
            self.add(self.group, inputs, column, x, values, out)

    def add(self, count: int, inputs: Any, column: Any, x: Any, values: Any, out: Any) -> None:
        """Adds the first `count` blocks of a group."""
        first = pl.program_id(1) * self.group
        for begin in range(0, count, self.together):
            some = range(begin, min(begin + self.together, count))
            parts = [self.dot(x[:, self.place(inputs[first + i], self.k)], values[i]) for i in some]
            for i, part in zip(some, parts, strict=True):
                out[:, self.place(column[first + i], self.n)] += part

    def place(self, block: Any, size: int) -> Any:
        return pl.ds(pl.multiple_of(block * size, LANES), size)

    def dot(self, x: jax.Array, value: jax.Array) -> jax.Array:
        exact = x.dtype == jnp.float32
        if value.dtype == jnp.int8:
            value = value.astype(jnp.float32)
        return lax.dot(
            *(x, value.astype(x.dtype)),
            precision=lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT,
            preferred_element_type=jnp.float32,
        )  # [R', n]
