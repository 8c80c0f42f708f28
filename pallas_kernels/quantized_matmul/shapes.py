"""Shapes that the product is measured and compiled at, with the configs they come from."""

from typing import Any

import jax.numpy as jnp

from pallas_kernels.quantized_matmul.reference import widths
from pallas_kernels.shape import Shape, array

GROUP = 128


def _arrays(rows: int, inputs: int, columns: int, bits: int) -> tuple[Any, ...]:
    codes = [array((inputs * width // 8, columns), jnp.uint8) for width in widths(bits)]
    return array((rows, inputs)), array((inputs // GROUP, columns), jnp.float16), *codes


def _shape(variant: str, name: str, rows: int, inputs: int, columns: int, bits: int) -> Shape:
    each = 2048  # columns of a part, which several programs have
    return Shape(
        name=f"lm_{variant}_{name}_{bits}b_{rows}",
        config=f"configs/language/lm.py:{variant}",
        arrays=_arrays(rows, inputs, columns, bits),
        options=dict(bits=bits),
        part=lambda parts: _arrays(rows, inputs, each * parts, bits),
        parts=columns // each,
        trained=False,
    )


# Channels and hidden channels of `configs/language/lm.py`: Llama 3.2 1B and Llama 3 8B.
SIZES = {"1b": (2048, 8192), "8b": (4096, 14_336)}
_BITS = {("1b", "gate"): (4, 3), ("1b", "down"): (4,), ("8b", "gate"): (4,), ("8b", "down"): (4, 2)}

SHAPES = tuple(
    _shape(variant, name, rows, *(SIZES[variant] if name == "gate" else SIZES[variant][::-1]), bits)
    for (variant, name), several in _BITS.items()
    for bits in several
    for rows in (1, 64)
)
