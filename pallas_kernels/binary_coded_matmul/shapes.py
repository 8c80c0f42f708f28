"""Shapes that the product is measured and compiled at, with the configs they come from."""

from typing import Any

import jax.numpy as jnp

from pallas_kernels.quantized_matmul.shapes import GROUP, SIZES
from pallas_kernels.shape import Shape, array


def _arrays(rows: int, inputs: int, columns: int, bits: int) -> tuple[Any, ...]:
    groups = inputs // GROUP
    scales = [array((bits, groups, columns), jnp.float16), array((groups, columns), jnp.float16)]
    return array((rows, inputs)), *scales, array((bits, inputs // 8, columns), jnp.uint8)


def _shape(variant: str, rows: int, bits: int) -> Shape:
    """The gate of the FFN."""
    inputs, columns = SIZES[variant]
    each = 2048  # columns of a part, which several programs have
    return Shape(
        name=f"lm_{variant}_gate_{bits}b_{rows}",
        config=f"configs/language/lm.py:{variant}",
        arrays=_arrays(rows, inputs, columns, bits),
        options={},
        part=lambda parts: _arrays(rows, inputs, each * parts, bits),
        parts=columns // each,
        trained=False,
    )


SHAPES = (_shape("1b", 1, 3), _shape("1b", 64, 3), _shape("8b", 1, 3))
