"""Products with stored matrices by the kernels of `pallas_kernels`, each device for its own rows.

A layout asks for them by its field `implementation`:

    plain        what stands beside the layout, on every platform
    kernel       the kernel of the platform; where it has none, or with a warning none for these shapes, the
                 reference
    reference    the specification of the kernels, everywhere: the matrix, unpacked, and a product

The rows of a batch that is cut over devices stay where they are; the matrix comes whole to every device, so
one that is cut itself is sent there for each product.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, UInt8

from effjax.compress.storage.packing import Planes
from effjax.compress.storage.trees import replaced, stored_in
from effjax.errors import UsageError
from effjax.parallel.each_device import on_each_device

Implementation = Literal["plain", "kernel", "reference"]
# Bits of codes that there are kernels for.
BITS = (2, 3, 4)


def check_bits(bits: int, implementation: Implementation) -> None:
    """Refuses codes that no kernel takes.

    Raises:
      UsageError: for such codes.
    """
    if implementation != "plain" and bits not in BITS:
        raise UsageError(
            f"implementation={implementation!r} takes codes of {', '.join(map(str, BITS))} bits, not {bits}:"
            " give implementation='plain'."
        )


def quantized_product(
    rows: Float[Array, "r k"],
    planes: Planes,
    bits: int,
    scale: Float[Array, "g #n"],
    zero: UInt8[Array, "g #n"] | None,
    implementation: Implementation,
) -> Float[Array, "r n"]:
    """The product with codes, in the dtype of the rows.

    Args:
      rows: what is multiplied.
      planes: codes, packed along k.
      bits: of a code.
      scale: of each group of k / g codes.
      zero: the code that stands for 0; None for the middle one.
      implementation: not `plain`.
    """
    # Pallas is slow to import, and most programs have no use for it.
    from pallas_kernels.quantized_matmul import quantized_matmul

    def product(rows: Any, scale: Any, zero: Any, *planes: Any) -> Any:
        return quantized_matmul(
            *(rows, scale, *planes), bits=bits, zero=zero, implementation=_named(implementation)
        )

    shape = (scale.shape[0], planes[0].shape[1])
    zero = None if zero is None else jnp.broadcast_to(zero, shape)
    return _cut(product, rows, jnp.broadcast_to(scale, shape), zero, *planes)


def binary_product(
    rows: Float[Array, "r k"],
    alpha: Float[Array, "q g n"],
    offset: Float[Array, "g n"],
    signs: UInt8[Array, "q bytes n"],
    implementation: Implementation,
) -> Float[Array, "r n"]:
    """The product with planes of signs, in the dtype of the rows; see `quantized_product`."""
    from pallas_kernels.binary_coded_matmul import binary_coded_matmul

    def product(*arrays: Any) -> Any:
        return binary_coded_matmul(*arrays, implementation=_named(implementation))

    return _cut(product, rows, alpha, offset, signs)


def sparse_block_product(
    rows: Float[Array, "r k"],
    values: Array,
    inputs: Integer[Array, "b"],
    starts: Integer[Array, "ends"],
    implementation: Implementation,
) -> Float[Array, "r n"]:
    """The product with the blocks of a sparse matrix, in the dtype of the rows; see `quantized_product`."""
    from pallas_kernels.block_sparse_matmul import block_sparse_matmul

    def product(*arrays: Any) -> Any:
        return block_sparse_matmul(*arrays, implementation=_named(implementation))

    return _cut(product, rows, values, inputs, starts)


def multiplied_by(params: Any, implementation: Implementation) -> Any:
    """The same tree, whose codes and signs are multiplied by so; other layouts stay as they are.

    Raises:
      UsageError: for codes that no kernel takes.
    """
    made = {}
    for path, leaf in stored_in(params).items():
        layout: Any = getattr(leaf, "layout", None)
        if hasattr(layout, "implementation"):
            layout = dataclasses.replace(layout, implementation=implementation)
            made[path] = leaf.replace(layout=layout)  # type: ignore[attr-defined]
    return replaced(params, made)


def _named(implementation: Implementation) -> Literal["reference"] | None:
    return "reference" if implementation == "reference" else None


def _cut(product: Callable[..., Any], rows: jax.Array, *held: jax.Array | None) -> jax.Array:
    whole = [(None,) * (0 if array is None else array.ndim) for array in held]
    return on_each_device(product, (("batch", None), *whole), ("batch", None))(rows, *held)
