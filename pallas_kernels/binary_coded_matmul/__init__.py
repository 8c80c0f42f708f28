"""The product with a matrix in planes of signs, on TPU and Hopper: no weight is ever decoded.

    y[r, n] = sum_g ( sum_{i < q} alpha[i, g, n] sum_{k in g} x[r, k] b[i, k, n]
                      + z[g, n] sum_{k in g} x[r, k] )

with signs b of -1 and 1. The inner sum is a product with ones, exact in every type. Park et al., "LUT-GEMM",
ICLR 2024, arXiv:2206.09557, look it up in tables of the 2^8 sums that 8 inputs can have; the kernels here
multiply by planes. What is saved is the same, the bytes of the weights, q bits each. Why not by tables, their
files say.

`pallas_kernels.quantized_matmul` says how bytes become operands. Where the product is differentiated, the
specification is.
"""

import jax
import numpy as np

from pallas_kernels.binary_coded_matmul import cost, gpu, reference, tpu
from pallas_kernels.op import Implementation, Interpret, Op, Unsupported

__all__ = ["OP", "binary_coded_matmul"]

DTYPES = ("float32", "bfloat16", "float16")

OP = Op(
    name="binary_coded_matmul",
    reference=reference.binary_coded_matmul,
    gpu=gpu.forward,
    tpu=tpu.forward,
    cost=cost.forward,
)


def binary_coded_matmul(
    x: jax.Array,
    alpha: jax.Array,
    offset: jax.Array,
    signs: jax.Array,
    *,
    implementation: Implementation | None = None,
    interpret: Interpret = False,
    strict: bool = False,
) -> jax.Array:
    """x W for W in planes of signs.

    Args:
      x: `[R, K]`.
      alpha: `[q, G, N]`, of each plane and each group of K / G weights that follow each other.
      offset: `[G, N]`, added to the weights of a group.
      signs: uint8 `[q, K / 8, N]`, from the lowest bit on; a bit of 1 is a plus. The last byte may hold less.
      implementation: `reference`, `gpu`, `tpu`; None chooses by the platform that is lowered for.
      interpret: runs the named kernel on any platform.
      strict: whether a kernel that does not lower is an error; else the reference is used, with a warning.

    Returns:
      `[R, N]`, in the type of x.

    Raises:
      Unsupported: for shapes that do not fit together or types that no implementation takes, and for what the
        named implementation does not take.
    """
    _check(x, alpha, offset, signs)
    return OP(*(x, alpha, offset, signs), implementation=implementation, interpret=interpret, strict=strict)


def _check(x: jax.Array, alpha: jax.Array, offset: jax.Array, signs: jax.Array) -> None:
    if (x.ndim, alpha.ndim, offset.ndim) != (2, 3, 2) or 0 in (*x.shape, *alpha.shape):
        raise Unsupported(
            f"binary_coded_matmul takes x [R, K], alpha [q, G, N] and offset [G, N] of at least one, not"
            f" {x.shape}, {alpha.shape} and {offset.shape}."
        )
    for name, array in (("x", x), ("alpha", alpha), ("offset", offset)):
        if array.dtype.name not in DTYPES:
            raise Unsupported(f"binary_coded_matmul: {name} is {array.dtype}: give {', '.join(DTYPES)}.")
    planes, groups, columns = alpha.shape
    if offset.shape != (groups, columns):
        raise Unsupported(f"binary_coded_matmul: offset {offset.shape} must be {(groups, columns)}.")
    if x.shape[1] % groups:
        raise Unsupported(f"binary_coded_matmul: {groups} groups do not divide the {x.shape[1]} inputs.")
    wanted = (planes, -(-x.shape[1] // 8), columns)
    if signs.shape != wanted or signs.dtype != np.uint8:
        raise Unsupported(
            f"binary_coded_matmul: signs {signs.dtype}{list(signs.shape)} must be uint8{list(wanted)}."
        )
