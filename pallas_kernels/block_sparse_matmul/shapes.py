"""Shapes that the product is measured and compiled at, with the configs they come from."""

from typing import Any

import jax.numpy as jnp

from pallas_kernels.shape import Shape, array

BLOCK = 128


def _arrays(rows: int, inputs: int, columns: int, density: float, dtype: Any) -> tuple[Any, ...]:
    blocks = round(density * (inputs // BLOCK) * (columns // BLOCK))
    return (
        *(array((rows, inputs)), array((blocks, BLOCK, BLOCK), dtype)),
        *(array((blocks,), jnp.int32), array((columns // BLOCK + 1,), jnp.int32)),
    )


def _shape(name: str, rows: int, density: float, dtype: Any = jnp.bfloat16) -> Shape:
    inputs, columns, each = 4096, 14_336, 2048  # columns of a part, which several groups have
    return Shape(
        name=f"lm_8b_gate_{name}",
        config="configs/language/lm.py:8b",
        arrays=_arrays(rows, inputs, columns, density, dtype),
        options={},
        part=lambda parts: _arrays(rows, inputs, each * parts, density, dtype),
        parts=columns // each,
        trained=False,
    )


# Channels and hidden channels of Llama 3 8B, with densities in and above the range that was published.
SHAPES = (
    _shape("half_1", 1, 0.5),
    _shape("fifth_1", 1, 0.2),
    _shape("fifth_64", 64, 0.2),
    _shape("fifth_1024", 1024, 0.2),
    _shape("fifth_int8_1", 1, 0.2, jnp.int8),
)
