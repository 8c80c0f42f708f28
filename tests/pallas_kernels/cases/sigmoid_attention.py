"""Lengths that no block divides, one token, rows that see nothing, huge and tiny numbers."""

import hypothesis.strategies as st
import numpy as np

from pallas_kernels.sigmoid_attention import sigmoid_attention
from tests.pallas_kernels.cases import Case


def numbers(queries, keys, heads, groups, size, values, magnitude=1.0, batch=1):
    draw = np.random.default_rng(0)
    shapes = [(batch, queries, heads, size), (batch, keys, groups, size), (batch, keys, groups, values)]
    return tuple((magnitude * draw.normal(size=shape)).astype(np.float32) for shape in shapes)


@st.composite
def arguments(draw):
    groups, each = draw(st.sampled_from([(1, 1), (1, 2), (2, 1)]))
    queries, keys = (draw(st.sampled_from([1, 5, 64, 129, 150])) for _ in "qk")
    size, values = draw(st.sampled_from([(8, 8), (64, 64), (64, 40)]))
    magnitude = draw(st.sampled_from([1e-3, 1.0, 30.0]))
    arrays = numbers(queries, keys, groups * each, groups, size, values, magnitude)
    return arrays, dict(causal=draw(st.booleans()))


def fully_masked():
    """More queries than keys: the first see none. Of the keys of one sequence none is valid."""
    arrays = numbers(70, 66, 2, 1, 16, 16, batch=2)
    valid = np.arange(66)[None] < np.array([[0], [65]])
    return arrays, dict(causal=True, valid=valid)


def packed():
    """Three documents in a row, over the edges of blocks."""
    arrays = numbers(150, 150, 2, 1, 16, 16)
    segments = np.repeat([[3, 1, 2]], [70, 10, 70], axis=1).astype(np.int32)
    return arrays, dict(causal=True, segments=segments)


CASE = Case(
    function=sigmoid_attention,
    arguments=arguments(),
    dtypes=dict(tpu=("float32", "bfloat16"), gpu=("bfloat16", "float16")),
    differentiated=3,
    fixed=dict(
        fully_masked=fully_masked,
        packed=packed,
        one_token=lambda: (numbers(1, 1, 2, 2, 8, 8), dict(causal=True)),
        many_blocks=lambda: (numbers(300, 530, 2, 1, 16, 8), dict(causal=True)),
        narrow_heads=lambda: (numbers(37, 530, 4, 4, 32, 32), dict(causal=True)),
        own_bias=lambda: (numbers(3, 129, 1, 1, 8, 8), dict(bias=0.5, scale=0.3)),
    ),
)
