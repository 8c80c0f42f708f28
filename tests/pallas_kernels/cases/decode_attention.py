"""Rows of no and of one slot, lengths that no block divides, pages in any order, scores out of range."""

import hypothesis.strategies as st
import numpy as np

from pallas_kernels.decode_attention import Within, decode_attention
from tests.pallas_kernels.cases import Case

NARROW = Within(phi=0.5, low=-4.0, high=4.0)


def numbers(tokens, slots, heads, groups, size, values, magnitude=1.0, batch=2):
    draw = np.random.default_rng(0)
    shapes = [(batch, tokens, heads, size), (batch, slots, groups, size), (batch, slots, groups, values)]
    q, k, v = ((draw.normal(size=shape)).astype(np.float32) for shape in shapes)
    return q * np.float32(magnitude), k, v


def lengths(*counts):
    return np.array(counts, np.int32)


@st.composite
def arguments(draw):
    groups, each = draw(st.sampled_from([(1, 4), (2, 1), (2, 3)]))
    tokens, slots = draw(st.sampled_from([1, 3])), draw(st.sampled_from([8, 152, 256]))
    size, values = draw(st.sampled_from([(64, 64), (64, 128)]))
    magnitude = draw(st.sampled_from([1e-3, 1.0, 30.0]))
    counts = [draw(st.integers(tokens, slots)), draw(st.sampled_from([0, 1, slots]))]
    within = draw(st.sampled_from([None, Within(), NARROW]))
    arrays = numbers(tokens, slots, groups * each, groups, size, values, magnitude)
    return (*arrays, lengths(*counts)), dict(within=within)


def pages():
    """More pages than are used, in no order; what comes after the length has no page."""
    q, k, v = numbers(2, 16 * 9, 4, 2, 64, 64, batch=2)
    k, v = (array.reshape(18, 16, *array.shape[2:]) for array in (k, v))
    table = np.random.default_rng(1).permutation(18).reshape(2, 9).astype(np.int32)
    table[1, 2:] = -1
    return (q, k, v, lengths(130, 17), table), dict(within=Within())


def hidden():
    """Padding in front of a row, and of one row nothing else."""
    arrays = numbers(1, 136, 2, 1, 64, 64)
    valid = np.arange(136)[None] >= np.array([[20], [136]])
    return (*arrays, lengths(130, 100)), dict(valid=valid, cap=3.0)


def overflow_in_one_row():
    """Scores of one row alone reach beyond 80, from its second block of slots on."""
    q, k, v = numbers(1, 256, 4, 2, 64, 64)
    k[1, 200:] *= 40
    return (q, k, v, lengths(250, 256)), dict(within=Within(0.0, -20.0, 20.0))


CASE = Case(
    function=decode_attention,
    arguments=arguments(),
    dtypes=dict(tpu=("float32", "bfloat16"), gpu=("bfloat16", "float16")),
    # Nobody differentiates decoding; test_decode_attention.py shows that one can.
    differentiated=0,
    fixed=dict(
        pages=pages,
        hidden=hidden,
        overflow_in_one_row=overflow_in_one_row,
        one_slot=lambda: ((*numbers(1, 1, 2, 2, 64, 64), lengths(1, 0)), {}),
        many_queries=lambda: ((*numbers(3, 72, 24, 1, 64, 64), lengths(2, 70)), dict(scale=0.3)),
    ),
)
