"""Shapes that the step is measured and compiled at, with the configs they come from."""

from typing import Any

import jax.numpy as jnp

from pallas_kernels.shape import Shape, array
from pallas_kernels.sparse_ffn.cost import fetched


def _arrays(neurons: int, values: int, channels: int, dtype: Any) -> tuple[Any, ...]:
    return (
        *(array((neurons,), dtype), array((values,), dtype)),
        *(array((neurons, values), dtype), array((neurons, channels), dtype)),
    )


def _shape(
    name: str, config: str, neurons: int, values: int, channels: int, active: float, dtype: Any = jnp.bfloat16
) -> Shape:
    count = round(active * neurons)
    each = 512  # rows of a part, which several groups have; to the profiler all are active
    return Shape(
        name=name,
        config=config,
        arrays=_arrays(neurons, values, channels, dtype),
        options=dict(active=count),
        part=lambda parts: _arrays(each * parts, values, channels, dtype),
        parts=-(-fetched(count, neurons, 4 // jnp.dtype(dtype).itemsize) // each),
        trained=False,
    )


# Llama 3 8B, whose perceptrons have the sides of those of Mistral 7B, with half of the neurons left out, as
# the authors of CATS do with that, and with 9 of 10, as `configs/language/cats.py` does. Gemma-2 2B: 8%.
SHAPES = (
    _shape("cats_8b_half", "configs/language/lm.py:8b", 14_336, 4096, 4096, 0.5),
    _shape("cats_8b_tenth", "configs/language/lm.py:8b", 14_336, 4096, 4096, 0.1),
    _shape("spark_2b", "configs/language/spark.py:2b", 13_824, 1280, 2304, 0.08),
    _shape("spark_2b_float32", "configs/language/spark.py:2b", 13_824, 1280, 2304, 0.08, jnp.float32),
)
