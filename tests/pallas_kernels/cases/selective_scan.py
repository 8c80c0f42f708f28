"""Lengths that no chunk divides, one token, either direction, steps that forget all or change nothing."""

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np

from pallas_kernels.selective_scan import selective_scan
from tests.pallas_kernels.cases import Case


def joined(u, dt, A, B, C, hidden=None, decay=None, first=None, **options):
    """Outputs and the last state in one array of one type."""
    y, last = selective_scan(u, dt, A, B, C, hidden, decay, first, **options)
    return jnp.concatenate([y.ravel(), last.astype(y.dtype).ravel()])


def numbers(length, inner, state, step=0.1, batch=1):
    draw = np.random.default_rng(0)
    normal = lambda *shape: draw.normal(size=shape).astype(np.float32)
    dt = np.float32(step) * np.exp(normal(batch, length, inner))
    selected = normal(batch, length, state), normal(batch, length, state)
    return normal(batch, length, inner), dt, -np.exp(normal(inner, state)), *selected


@st.composite
def arguments(draw):
    length = draw(st.sampled_from([1, 5, 33, 70]))
    inner, state = draw(st.sampled_from([(8, 4), (130, 5), (24, 16)]))
    arrays = numbers(length, inner, state, draw(st.sampled_from([1e-4, 0.1, 1e3])))
    return arrays, dict(reverse=draw(st.booleans()))


def goes_on():
    """Behind a state, of two rows."""
    hidden = np.random.default_rng(1).normal(size=(2, 12, 3)).astype(np.float32)
    return (*numbers(40, 12, 3, batch=2), hidden), dict(reverse=True)


def decayed():
    """Over times of their own, of some of which two documents know nothing of each other."""
    arrays, draw = numbers(40, 12, 3, batch=2), np.random.default_rng(1)
    since = arrays[1] * draw.integers(1, 5, arrays[1].shape).astype(np.float32)
    first = draw.random((2, 40)) < 0.1
    hidden = draw.normal(size=(2, 12, 3)).astype(np.float32)
    return (*arrays, hidden, since), dict(first=first)


CASE = Case(
    function=joined,
    arguments=arguments(),
    dtypes=dict(tpu=("float32", "bfloat16"), gpu=("bfloat16", "float16", "float32")),
    differentiated=5,
    fixed=dict(
        goes_on=goes_on,
        decayed=decayed,
        one_token=lambda: (numbers(1, 8, 4), {}),
        many_channels=lambda: (numbers(20, 1100, 16), {}),
    ),
)
