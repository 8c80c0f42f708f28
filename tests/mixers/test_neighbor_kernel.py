"""Mixers of neighbourhoods, windows and stripes by the kernel: the same outputs and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from jax.experimental.pallas import tpu as pltpu

from effjax.mixers import CrossShapedWindow, ShiftedWindow
from effjax.mixers.context import Context
from effjax.mixers.neighborhood import Neighborhood
from effjax.mixers.position_bias import LogSpacedContinuous
from pallas_kernels import neighborhood_attention

# The mixer, the map, and how often it calls the kernel.
MIXERS = {
    "nat": (Neighborhood, dict(kernel=3), (5, 9), 1),
    "dinat": (Neighborhood, dict(kernel=3, dilation=2), (5, 7), 1),
    "swin": (ShiftedWindow, dict(window=4), (8, 4), 1),
    "shifted": (ShiftedWindow, dict(window=3, shifted=True), (5, 7), 1),
    "after_shift": (ShiftedWindow, dict(window=4, shifted=True, pad="after_shift"), (7, 6), 1),
    "cosine": (
        ShiftedWindow,
        dict(window=2, shifted=True, similarity="cosine", bias=LogSpacedContinuous(8)),
        (4, 6),
        1,
    ),
    "cswin": (CrossShapedWindow, dict(stripe=2), (4, 5), 2),
    "whole_map": (CrossShapedWindow, dict(stripe=None), (3, 4), 1),
}
WIDTH, HEADS = 8, 2


@pytest.fixture
def interpreted(monkeypatch):
    """The TPU's kernel in the interpreter, where the platform would choose; tells what was called."""
    called, kernel = [], neighborhood_attention.OP

    def run(*arrays, implementation, interpret, **options):
        if implementation is not None:
            return kernel(*arrays, implementation=implementation, interpret=interpret, **options)
        called.append(options)
        return kernel(*arrays, implementation="tpu", interpret=pltpu.InterpretParams(), **options)

    monkeypatch.setattr(neighborhood_attention, "OP", run)
    return called


def made(case, **fields):
    kind, others, _, _ = MIXERS[case]
    return kind(heads=HEADS, **others, **fields)


def drawn(mixer, x):
    """Random parameters throughout."""
    shapes = meta.unbox(jax.eval_shape(mixer.init, jax.random.key(0), x, Context()))
    draw = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(draw.normal(size=leaf.shape) * 0.4, jnp.float32), shapes)


def slopes(mixer, params, x):
    def loss(params, x):
        y = mixer.apply(params, x, Context())
        return jnp.sum(jnp.sin(y)), y

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)


def close(found, expected):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("case", MIXERS)
def test_the_kernel_gives_the_same_and_so_do_slopes(case, draw, interpreted):
    x = jnp.asarray(draw.normal(size=(2, *MIXERS[case][2], WIDTH)), jnp.float32)
    params = drawn(made(case), x)
    expected = slopes(made(case), params, x)
    close(slopes(made(case, implementation="reference"), params, x), expected)
    assert not interpreted
    close(slopes(made(case, implementation="kernel"), params, x), expected)
    assert len(interpreted) == MIXERS[case][3]


@pytest.mark.parametrize(("implementation", "calls"), [("kernel", 1), ("reference", 0), ("plain", 0)])
@pytest.mark.parametrize("case", MIXERS)
def test_is_lowered_with_the_kernel_of_the_platform(case, implementation, calls):
    mixer = made(case, implementation=implementation)
    x = jax.ShapeDtypeStruct((2, *MIXERS[case][2], WIDTH), jnp.float32)
    shapes = meta.unbox(jax.eval_shape(mixer.init, jax.random.key(0), x, Context()))
    text = jax.jit(mixer.apply).trace(shapes, x, Context()).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == calls * MIXERS[case][3]
