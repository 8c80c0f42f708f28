"""Mamba-2 against its recurrence in float64, and what decoding, packing and groups promise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.errors import UsageError
from effjax.mixers import Mamba2
from effjax.mixers.context import Context
from effjax.mixers.duality import dual_scan
from effjax.models.lm import LM, DecoderBlock

WIDTH = 8
TOY = dict(state=5, head=4, groups=2)


def drawn(module, *inputs):
    """Random parameters throughout."""
    shapes = meta.unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs))
    draw = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: np.float32(draw.normal(size=leaf.shape) * 0.4), shapes)


def by_hand(params, x, mixer):
    """The recurrence token by token and head by head, in float64."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["params"])
    inner, heads, _ = mixer.sizes(WIDTH, mixer.expand)
    silu = lambda a: a / (1 + np.exp(-a))
    out = []
    for row in np.asarray(x, np.float64):
        u, z, chosen = (row @ p[name]["kernel"] for name in ("input", "gate", "select"))
        dt = np.log1p(np.exp(row @ p["step_size"]["kernel"] + p["step_bias"]))
        taps = np.concatenate([u, chosen], axis=1)
        kernel = np.concatenate([p["conv_kernel"], p["select_conv_kernel"]], axis=1)
        bias = np.concatenate([p["conv_bias"], p["select_conv_bias"]])
        padded = np.concatenate([np.zeros((mixer.width - 1, taps.shape[1])), taps])
        h, ys = np.zeros((heads, mixer.head, mixer.state)), []
        for t in range(len(row)):
            v = silu((padded[t : t + mixer.width] * kernel).sum(0) + bias)
            v, B, C = np.split(v, [inner, inner + mixer.groups * mixer.state])
            B, C = (a.reshape(mixer.groups, mixer.state) for a in (B, C))
            y = np.zeros((heads, mixer.head))
            for head in range(heads):
                g, xh = head * mixer.groups // heads, v[head * mixer.head : (head + 1) * mixer.head]
                h[head] *= np.exp(-np.exp(p["A_log"][head]) * dt[t, head])
                h[head] += dt[t, head] * np.outer(xh, B[g])
                y[head] = h[head] @ C[g] + p["D"][head] * xh
            y = (y.reshape(-1) * silu(z[t])).reshape(mixer.groups, -1)
            y = y / np.sqrt((y**2).mean(-1, keepdims=True) + mixer.epsilon)
            ys.append(y.reshape(-1) * p["norm"]["scale"])
        out.append(np.stack(ys) @ p["output"]["kernel"])
    return np.stack(out)


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(2), (2, 11, WIDTH))


def run(mixer, params, x, context=None):
    return jax.jit(mixer.apply)(params, x, context or Context())


@pytest.mark.parametrize("chunk", [1, 4, 256])
def test_equals_the_recurrence(x, chunk):
    mixer = Mamba2(**TOY, chunk=chunk)
    params = drawn(mixer, x, Context())
    np.testing.assert_allclose(run(mixer, params, x), by_hand(params, x, mixer), rtol=1e-4, atol=1e-5)


def scan_inputs():
    draw = np.random.default_rng(3)
    shapes = [(2, 13, 4, 3), (2, 13, 4), (4,), (2, 13, 2, 5), (2, 13, 2, 5), (2, 4, 3, 5)]
    x, dt, A, B, C, h = (draw.normal(size=shape) for shape in shapes)
    return tuple(map(jnp.asarray, (x, np.abs(dt), -np.abs(A), B, C, h)))


def sequential(x, dt, A, B, C, h, first=None):
    first = jnp.zeros(x.shape[:2], bool) if first is None else first

    def step(h, now):
        x, dt, B, C, first = now
        B, C = (jnp.repeat(a, 2, axis=1) for a in (B, C))
        decay = jnp.where(first[:, None], 0.0, jnp.exp(dt * A[None]))
        h = decay[..., None, None] * h + (dt[..., None] * x)[..., None] * B[:, :, None]
        return h, jnp.einsum("bhps,bhs->bhp", h, C)

    h, y = jax.lax.scan(step, h, tuple(jnp.moveaxis(a, 1, 0) for a in (x, dt, B, C, first)))
    return jnp.moveaxis(y, 0, 1), h


FIRST = np.isin(np.arange(13), [0, 3, 4, 9])[None].repeat(2, 0)


@pytest.mark.parametrize(("chunk", "first"), [(4, None), (13, None), (100, None), (4, FIRST), (13, FIRST)])
def test_chunks_equal_the_sequence_in_float64_and_so_do_gradients(chunk, first):
    with jax.enable_x64(True):
        inputs = scan_inputs()
        first = None if first is None else jnp.asarray(first)

        def both(scan):
            def loss(*a):
                y, h = scan(*a)
                return jnp.sum(jnp.sin(y)) + jnp.sum(h**2), (y, h)

            return jax.jit(jax.grad(loss, argnums=tuple(range(6)), has_aux=True))(*inputs)

        mine = both(lambda *a: dual_scan(*a, first, chunk))
        theirs = both(lambda *a: sequential(*a, first))
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-11), mine, theirs)


def test_fast_forgetting_over_long_chunks_is_finite_and_right():
    """Rates of 128 over 256 tokens: later minus earlier would overflow, and sums of logarithms are large."""
    draw = np.random.default_rng(4)
    x, B, C = (np.float32(draw.normal(size=(1, 256, 2, 4))) for _ in range(3))
    dt, A = np.float32(draw.uniform(0.001, 0.1, (1, 256, 2))), np.array([-128.0, -1.0], np.float32)
    inputs = tuple(map(jnp.asarray, (x, dt, A, B, C, np.zeros((1, 2, 4, 4), np.float32))))
    y, pull = jax.vjp(lambda *a: dual_scan(*a)[0], *inputs)
    with jax.enable_x64(True):
        exact = [jnp.asarray(np.asarray(a), np.float64) for a in inputs]
        wanted, _ = dual_scan(*exact, chunk=1)
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-5)
    assert all(jnp.isfinite(leaf).all() for leaf in pull(y))


def test_memory_of_the_backward_pass_grows_with_the_chunk():
    """What is kept for the backward pass holds no state of every token, and no weights of every pair."""
    shapes = [(1, 256, 2, 8), (1, 256, 2), (2,), (1, 256, 1, 16), (1, 256, 1, 16), (1, 2, 8, 16)]
    _, pull = jax.vjp(lambda *a: dual_scan(*a, None, 16)[0], *map(jnp.ones, shapes))
    largest = max(leaf.size for leaf in jax.tree.leaves(pull))
    assert largest <= 256 * 16  # states would be 256 * 2 * 8 * 16, weights of chunks 256 * 2 * 16


@pytest.mark.parametrize("sizes", [(1,) * 11, (6, 1, 4)])
def test_steps_equal_the_whole(x, sizes):
    mixer = Mamba2(**TOY, chunk=4)
    params = drawn(mixer, x, Context())
    cache = mixer.init_cache(2, 99, WIDTH)
    shapes = jax.tree.map(jnp.shape, cache)
    step = jax.jit(functools.partial(mixer.apply, method="step"))
    pieces = []
    for piece in jnp.split(x, np.cumsum(sizes)[:-1], axis=1):
        y, cache = step(params, piece, cache, Context())
        pieces.append(y)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), run(mixer, params, x), rtol=1e-4, atol=1e-5)
    assert int(cache.written) == 11
    assert jax.tree.map(jnp.shape, cache) == shapes


def test_packed_documents_and_padding_equal_separate_ones(x):
    mixer = Mamba2(**TOY, chunk=4)
    params = drawn(mixer, x, Context())
    segments = jnp.array([[1] * 4 + [2] * 5 + [0] * 2] * 2)
    together = run(mixer, params, x, Context(segments=segments))
    np.testing.assert_allclose(together[:, :4], run(mixer, params, x[:, :4]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(together[:, 4:9], run(mixer, params, x[:, 4:9]), rtol=1e-4, atol=1e-5)
    # Left padding, as decoding has it: negative positions.
    positions = jnp.broadcast_to(jnp.arange(11)[None] - 3, (2, 11))
    step = jax.jit(functools.partial(mixer.apply, method="step"))
    y, _ = step(params, x, mixer.init_cache(2, 1, WIDTH), Context(positions=positions))
    np.testing.assert_allclose(y[:, 3:], run(mixer, params, x[:, 3:]), rtol=1e-4, atol=1e-5)


def test_initial_values_are_those_of_the_published_code():
    mixer = Mamba2(head=2)
    x = jnp.zeros((1, 1, 256))
    p = meta.unbox(jax.jit(mixer.init)(jax.random.key(0), x, Context()))["params"]
    rates = np.exp(p["A_log"])
    assert 1 <= rates.min() < 1.5
    assert 15.5 < rates.max() <= 16
    steps = np.asarray(jax.nn.softplus(p["step_bias"]))
    assert steps.min() >= 1e-3 * 0.999
    assert steps.max() <= 1e-1 * 1.001
    assert (p["D"] == 1).all()
    assert (p["norm"]["scale"] == 1).all()
    assert np.abs(p["conv_kernel"]).max() <= 0.5


def test_published_size():
    """Mamba2-130M: 24 layers of 768 channels, a vocabulary of 50,288: 128,989,632 parameters."""
    model = LM(DecoderBlock(Mamba2(), ffn=None), vocab=50_288, dim=768, depth=24, tied=True)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 128_989_632


def test_every_parameter_and_cache_names_its_axes(x):
    mixer = Mamba2(**TOY)
    boxed = jax.eval_shape(mixer.init, jax.random.key(0), x, Context())["params"]
    for leaf in jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, meta.AxisMetadata)):
        assert len(leaf.names) == leaf.value.ndim
    cache, axes = mixer.init_cache(2, 1, WIDTH), mixer.cache_axes()
    for name in ("inputs", "chosen", "hidden", "written"):
        assert len(getattr(axes, name)) == getattr(cache, name).ndim


def test_bfloat16_stays_near(x):
    mixer = Mamba2(**TOY)
    params = drawn(mixer, x, Context())
    low = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    y = run(mixer, low, x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), run(mixer, params, x), atol=0.1)


def test_refuses_heads_that_do_not_divide_and_steps_with_segments(x):
    for changes in (dict(head=5), dict(head=8, groups=3)):
        with pytest.raises(UsageError, match="16 inner channels make no heads of"):
            jax.eval_shape(Mamba2(**changes).init, jax.random.key(0), x, Context())
    mixer, context = Mamba2(**TOY), Context(valid=jnp.ones((2, 11), bool))
    with pytest.raises(UsageError, match="by position alone"):
        mixer.init(jax.random.key(0), x, mixer.init_cache(2, 1, WIDTH), context, method="step")
