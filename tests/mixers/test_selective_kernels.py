"""Mamba layers whose scan is a kernel: the same outputs, states and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from jax.experimental.pallas import tpu as pltpu

from effjax.errors import UsageError
from effjax.mixers import Mamba, VisionMamba
from effjax.mixers.context import Context
from effjax.mixers.vision_mamba import Direction
from pallas_kernels import selective_scan

WIDTH, N = 8, 11
MIXERS = {
    "mamba": (Mamba, Context()),
    "packed": (Mamba, Context(segments=jnp.asarray([[1, 1, 1, 2, 2, 2, 2, 2, 3, 0, 0]] * 2))),
    "vision": (VisionMamba, Context()),
    "pruned": (
        VisionMamba,
        Context(positions=jnp.cumsum(1 + jnp.arange(N) % 3)[None] * jnp.ones((2, 1), int)),
    ),
}


@pytest.fixture
def interpreted(monkeypatch):
    """The TPU's kernel in the interpreter, where the platform would choose; tells what was called."""
    called, kernel = [], selective_scan.OP

    def run(*arrays, implementation, interpret, **options):
        if implementation is not None:
            return kernel(*arrays, implementation=implementation, interpret=interpret, **options)
        called.append(options)
        return kernel(*arrays, implementation="tpu", interpret=pltpu.InterpretParams(), **options)

    monkeypatch.setattr(selective_scan, "OP", run)
    return called


@pytest.fixture
def x(draw):
    return jnp.asarray(draw.normal(size=(2, N, WIDTH)), jnp.float32)


def drawn(mixer, x, context):
    """Random parameters throughout."""
    shapes = meta.unbox(jax.eval_shape(mixer.init, jax.random.key(0), x, context))
    draw = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(draw.normal(size=leaf.shape) * 0.4, jnp.float32), shapes)


def slopes(mixer, params, x, context):
    def loss(params, x):
        y = mixer.apply(params, x, context)
        return jnp.sum(jnp.sin(y)), y

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)


def close(found, expected):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", MIXERS)
def test_the_kernel_gives_the_same_and_so_do_slopes(case, x, interpreted):
    """Of Vim both directions, and one of them reads from the last token; and so does the reference."""
    kind, context = MIXERS[case]
    params = drawn(kind(state=3), x, context)
    expected = slopes(kind(state=3), params, x, context)
    close(slopes(kind(state=3, implementation="reference"), params, x, context), expected)
    assert not interpreted
    close(slopes(kind(state=3, implementation="kernel"), params, x, context), expected)
    assert [one["reverse"] for one in interpreted] == [False, True][: 1 + (kind is VisionMamba)]


def test_a_prompt_and_steps_equal_the_whole(x, interpreted):
    mixer = Mamba(state=3, implementation="kernel")
    params = drawn(mixer, x, Context())
    expected = jax.jit(Mamba(state=3).apply)(params, x, Context())
    step = jax.jit(lambda x, cache: mixer.apply(params, x, cache, Context(), method="step"))
    y, cache = step(x[:, :9], mixer.init_cache(2, N, WIDTH))
    found = [y]
    for n in (9, 10):
        y, cache = step(x[:, n : n + 1], cache)
        found.append(y)
    close(jnp.concatenate(found, 1), expected)
    assert interpreted


@pytest.mark.parametrize(("implementation", "expected"), [("kernel", 2), ("reference", 0), ("chunks", 0)])
def test_is_lowered_with_the_kernel_of_the_platform(implementation, expected):
    mixer = VisionMamba(implementation=implementation)
    x = jax.ShapeDtypeStruct((2, 16, 64), jnp.float32)
    shapes = meta.unbox(jax.eval_shape(mixer.init, jax.random.key(0), x, Context()))
    text = jax.jit(mixer.apply).trace(shapes, x, Context()).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == expected


def test_chunks_are_not_read_backwards(x):
    direction = Direction(3)
    with pytest.raises(UsageError, match="chunks are read from their first token"):
        direction.init(jax.random.key(0), x, 1, None, reverse=True)
