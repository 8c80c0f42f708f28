"""The product with a matrix of 2, 3 or 4 bits a weight, on TPU and Hopper; codes are unpacked in registers.

    y[r, n] = sum_g s[g, n] ( sum_{k in g} x[r, k] c[k, n]  -  z[g, n] sum_{k in g} x[r, k] )

With few rows a step takes the time of reading the codes, and that is all that is read: a group's products are
summed with whole numbers for weights, which every type holds exactly, and the scale is applied to the sum.

Codes lie in whole bytes, along the inputs: a byte holds codes, or the pieces of so many codes, that follow
each other from its lowest bit on. Codes of 3 bits are cut into a low piece of 2 and a high one of 1, of which
each fills bytes of its own. Such a byte needs no unpacking into neighbours:

    sum_k x[k] c[k]  =  sum_p sum_j x[each j + p] piece_p(number j),        each = pieces of a number

it is the small x of which every so many-th number is taken. Group-wise codes: Frantar et al., "GPTQ", ICLR
2023; kernels that decode between memory and product: Kim et al., "FineQuant", 2023, arXiv:2308.09723.

Any number of rows is taken: beyond 256 on a TPU, 64 on a GPU (16 at 3 bits) they are cut into tiles, of which
each unpacks the codes again. Where the product is differentiated, the specification is: nobody trains codes,
and the cotangent of x is a plain product.
"""

import jax
import numpy as np

from pallas_kernels.op import Implementation, Interpret, Op, Unsupported
from pallas_kernels.quantized_matmul import cost, gpu, reference, tpu

__all__ = ["OP", "quantized_matmul"]

DTYPES = ("float32", "bfloat16", "float16")
BITS = (2, 3, 4)

OP = Op(
    name="quantized_matmul",
    reference=reference.quantized_matmul,
    gpu=gpu.forward,
    tpu=tpu.forward,
    cost=cost.forward,
)


def quantized_matmul(
    x: jax.Array,
    scale: jax.Array,
    *codes: jax.Array,
    bits: int,
    zero: jax.Array | None = None,
    implementation: Implementation | None = None,
    interpret: Interpret = False,
    strict: bool = False,
) -> jax.Array:
    """x W for W in codes.

    Args:
      x: `[R, K]`.
      scale: `[G, N]`, of each group of K / G weights that follow each other.
      codes: uint8 `[K bits / 8, N]`; of 3 bits two such arrays, of the low 2 bits and of the high one:
        `[K / 4, N]` and `[K / 8, N]`. The last byte may hold less.
      bits: of a code.
      zero: `[G, N]` uint8, the code that stands for 0; None means `2^(bits - 1)`.
      implementation: `reference`, `gpu`, `tpu`; None chooses by the platform that is lowered for.
      interpret: runs the named kernel on any platform.
      strict: whether a kernel that does not lower is an error; else the reference is used, with a warning.

    Returns:
      `[R, N]`, in the type of x.

    Raises:
      Unsupported: for shapes that do not fit together or types that no implementation takes, and for what the
        named implementation does not take.
    """
    _check(x, scale, codes, bits, zero)
    low, high = (*codes, None)[:2]
    return OP(
        *(x, scale, zero, low, high),
        implementation=implementation,
        interpret=interpret,
        strict=strict,
        bits=bits,
    )


def _check(
    x: jax.Array, scale: jax.Array, codes: tuple[jax.Array, ...], bits: int, zero: jax.Array | None
) -> None:
    if bits not in BITS:
        raise Unsupported(f"quantized_matmul takes codes of {', '.join(map(str, BITS))} bits, not {bits}.")
    if x.ndim != 2 or scale.ndim != 2 or 0 in (*x.shape, *scale.shape):
        raise Unsupported(
            f"quantized_matmul takes x [R, K] and scale [G, N] of at least one, not {x.shape} and"
            f" {scale.shape}."
        )
    for name, array in (("x", x), ("scale", scale)):
        if array.dtype.name not in DTYPES:
            raise Unsupported(f"quantized_matmul: {name} is {array.dtype}: give {', '.join(DTYPES)}.")
    (_, count), (groups, columns) = x.shape, scale.shape
    if count % groups:
        raise Unsupported(f"quantized_matmul: {groups} groups do not divide the {count} inputs.")
    wanted = [(-(-count * width // 8), columns) for width in reference.widths(bits)]
    if [plane.shape for plane in codes] != wanted or any(plane.dtype != np.uint8 for plane in codes):
        given = ", ".join(f"{plane.dtype}{list(plane.shape)}" for plane in codes)
        told = ", ".join(f"uint8{list(shape)}" for shape in wanted)
        raise Unsupported(
            f"quantized_matmul: {bits} bits of {count} x {columns} weights are {told}, not {given}."
        )
    if zero is not None and (zero.shape != scale.shape or zero.dtype != np.uint8):
        raise Unsupported(
            f"quantized_matmul: zero {zero.dtype}{list(zero.shape)} must be uint8{list(scale.shape)}."
        )
