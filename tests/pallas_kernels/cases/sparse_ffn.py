"""No active neuron, one, all; groups of rows that are full and not; numbers that no group divides."""

import hypothesis.strategies as st
import numpy as np

from pallas_kernels.sparse_ffn import sparse_ffn
from tests.pallas_kernels.cases import Case


def numbers(neurons, active, values=128, channels=128, magnitude=1.0):
    """Gates of which so many are not zero, in any place, x, and both matrices."""
    draw = np.random.default_rng(active)
    gate = np.zeros(neurons)
    gate[draw.permutation(neurons)[:active]] = draw.choice([-1, 1], active) * draw.uniform(0.5, 2, active)
    shapes = [(values,), (neurons, values), (neurons, channels)]
    x, expand, contract = (draw.normal(size=shape) for shape in shapes)
    return tuple(array.astype(np.float32) for array in (gate, magnitude * x, expand, contract))


@st.composite
def arguments(draw):
    neurons = draw(st.sampled_from([6, 128, 134, 400]))
    active = draw(st.sampled_from([0, 1, neurons // 3, neurons]))
    values, channels = draw(st.sampled_from([(128, 128), (128, 384), (256, 128)]))
    magnitude = draw(st.sampled_from([1e-3, 1.0, 30.0]))
    return numbers(neurons, active, values, channels, magnitude), {}


def ends():
    """The first and the last neuron alone, in groups of one."""
    gate, *rest = numbers(260, 0)
    gate[[0, -1]] = 1.0, -2.0
    return (gate, *rest), {}


def tiny_gates():
    """Gates that are small and not zero."""
    gate, *rest = numbers(200, 150)
    return (gate * np.float32(1e-6), *rest), {}


CASE = Case(
    function=sparse_ffn,
    arguments=arguments(),
    dtypes=dict(tpu=("float32", "bfloat16")),
    # Nobody differentiates decoding; test_sparse_ffn.py shows that one can.
    differentiated=0,
    fixed=dict(
        ends=ends,
        tiny_gates=tiny_gates,
        none=lambda: (numbers(130, 0), {}),
        a_full_group=lambda: (numbers(300, 128), {}),
        one_more_than_a_group=lambda: (numbers(300, 129), dict(active=3)),
        all=lambda: (numbers(390, 390), {}),
    ),
)
