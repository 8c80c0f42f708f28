"""The product with a matrix of which whole blocks are zero and are neither stored nor read, on TPU.

    y[r, j] = sum_{starts[j] <= b < starts[j + 1]} x[r, inputs[b]] values[b]

of blocks: x[r, i] are k inputs, y[r, j] are n outputs. They are what a matrix unit takes, 128 by 128 or more.
With few rows a product takes the time of reading the matrix, so that a share of the blocks takes that share
of the time. Blocks of one by four, of which Shen et al. 2023, arXiv:2306.16601, make operands of a CPU's
instructions, are for `effjax.compress.storage`, which gathers them: no such unit skips anything so small.

Only forward: pruned matrices train behind masks. Where it is differentiated after all, the specification is.
"""

import jax

from pallas_kernels.block_sparse_matmul import cost, reference, tpu
from pallas_kernels.op import Implementation, Interpret, Op, Unsupported

__all__ = ["OP", "block_sparse_matmul"]

DTYPES = ("float32", "bfloat16", "float16")
VALUES = (*DTYPES, "int8")

OP = Op(
    name="block_sparse_matmul", reference=reference.block_sparse_matmul, tpu=tpu.forward, cost=cost.forward
)


def block_sparse_matmul(
    x: jax.Array,
    values: jax.Array,
    inputs: jax.Array,
    starts: jax.Array,
    *,
    implementation: Implementation | None = None,
    interpret: Interpret = False,
    strict: bool = False,
) -> jax.Array:
    """x W of the blocks that there are.

    Args:
      x: `[R, K]`.
      values: `[B, k, n]`, by column, in the type of x or in int8, whose scale the caller applies.
      inputs: `[B]` integers, the row of every block, from 0 to K / k - 1.
      starts: `[N / n + 1]` integers that do not fall, from 0 to B: where the blocks of each column begin.
      implementation: `reference`, `gpu`, `tpu`; None chooses by the platform that is lowered for.
      interpret: runs the named kernel on any platform.
      strict: whether a kernel that does not lower is an error; else the reference is used, with a warning.

    Returns:
      `[R, N]`, in the type of x; sums are float32.

    Raises:
      Unsupported: for shapes that do not fit together or types that no implementation takes, and for what the
        named implementation does not take.
    """
    _check(x, values, inputs, starts)
    return OP(
        *(x, values, inputs.astype("int32"), starts.astype("int32")),
        implementation=implementation,
        interpret=interpret,
        strict=strict,
    )


def _check(x: jax.Array, values: jax.Array, inputs: jax.Array, starts: jax.Array) -> None:
    shapes = f"x {x.shape}, values {values.shape}, inputs {inputs.shape} and starts {starts.shape}"
    ranks = (x.ndim, values.ndim, inputs.ndim, starts.ndim)
    if ranks != (2, 3, 1, 1) or 0 in (*x.shape, *values.shape) or starts.size < 2:
        raise Unsupported(
            "block_sparse_matmul takes x [R, K], values [B, k, n], inputs [B] and starts [N / n + 1] of at"
            f" least one row, block and column, not {shapes}."
        )
    if inputs.shape[0] != values.shape[0] or x.shape[1] % values.shape[1]:
        raise Unsupported(
            f"block_sparse_matmul: {shapes} do not fit: every block has an input, and blocks divide K."
        )
    if x.dtype.name not in DTYPES or values.dtype.name not in (x.dtype.name, "int8"):
        raise Unsupported(
            f"block_sparse_matmul takes x of {', '.join(DTYPES)} and values of the same type or int8, not"
            f" {x.dtype} and {values.dtype}."
        )
    for name, array in (("inputs", inputs), ("starts", starts)):
        if not jax.numpy.issubdtype(array.dtype, jax.numpy.integer):
            raise Unsupported(f"block_sparse_matmul: {name} are integers, not {array.dtype}.")
