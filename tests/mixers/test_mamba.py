import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.errors import UsageError
from effjax.ffn import Gated
from effjax.mixers import Mamba
from effjax.mixers.context import Context
from effjax.mixers.selective import selective_scan
from effjax.models.lm import LM, DecoderBlock

WIDTH = 8


def drawn(module, *inputs):
    """Random parameters throughout; rates and step sizes stay in a sane range."""
    shapes = meta.unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs))
    draw = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: np.float32(draw.normal(size=leaf.shape) * 0.4), shapes)


def by_hand(params, x, mixer):
    """The recurrence token by token, in float64."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["params"])
    inner, rank = mixer.sizes(WIDTH)
    silu = lambda a: a / (1 + np.exp(-a))
    out = []
    for row in np.asarray(x, np.float64):
        u, z = row @ p["input"]["kernel"], row @ p["gate"]["kernel"]
        padded = np.concatenate([np.zeros((mixer.width - 1, inner)), u])
        h, ys = np.zeros((inner, mixer.state)), []
        for t in range(len(row)):
            v = silu((padded[t : t + mixer.width] * p["conv_kernel"]).sum(0) + p["conv_bias"])
            r, B, C = np.split(v @ p["select"]["kernel"], (rank, rank + mixer.state))
            dt = np.log1p(np.exp(r @ p["step_size"]["kernel"] + p["step_size"]["bias"]))
            h = np.exp(dt[:, None] * -np.exp(p["A_log"])) * h + (dt * v)[:, None] * B[None]
            ys.append((h @ C + p["D"] * v) * silu(z[t]))
        out.append(np.stack(ys) @ p["output"]["kernel"])
    return np.stack(out)


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(2), (2, 11, WIDTH))


def run(mixer, params, x, context=None):
    return jax.jit(mixer.apply)(params, x, context or Context())


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_equals_the_recurrence(x, chunk):
    mixer = Mamba(state=5, chunk=chunk)
    params = drawn(mixer, x, Context())
    np.testing.assert_allclose(run(mixer, params, x), by_hand(params, x, mixer), rtol=1e-4, atol=1e-5)


def scan_inputs():
    draw = np.random.default_rng(3)
    u, dt, A, B, C, h = (
        draw.normal(size=s) for s in [(2, 13, 3)] * 2 + [(3, 4)] + [(2, 13, 4)] * 2 + [(2, 3, 4)]
    )
    return tuple(map(jnp.asarray, (u, np.abs(dt), -np.abs(A), B, C, h)))


def sequential(u, dt, A, B, C, h):
    def step(h, now):
        u, dt, B, C = now
        h = jnp.exp(dt[..., None] * A[None]) * h + (dt * u)[..., None] * B[:, None]
        return h, jnp.einsum("bis,bs->bi", h, C)

    h, y = jax.lax.scan(step, h, tuple(jnp.moveaxis(a, 1, 0) for a in (u, dt, B, C)))
    return jnp.moveaxis(y, 0, 1), h


@pytest.mark.parametrize("chunk", [4, 13, 100])
def test_chunks_equal_the_sequence_in_float64_and_so_do_gradients(chunk):
    with jax.enable_x64(True):
        inputs = scan_inputs()
        here = lambda *a: selective_scan(*a, None, chunk)
        for got, wanted in zip(here(*inputs), sequential(*inputs), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-13)

        def loss(scan, *a):
            y, h = scan(*a)
            return jnp.sum(jnp.sin(y)) + jnp.sum(h**2)

        every = tuple(range(6))
        mine = jax.grad(functools.partial(loss, here), argnums=every)(*inputs)
        theirs = jax.grad(functools.partial(loss, sequential), argnums=every)(*inputs)
        for got, wanted in zip(mine, theirs, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-10, atol=1e-11)


def test_memory_of_the_backward_pass_grows_with_the_chunk():
    """What is kept for the backward pass holds no array of all tokens times all states."""
    shapes = [(1, 256, 8)] * 2 + [(8, 16)] + [(1, 256, 16)] * 2 + [(1, 8, 16)]
    inputs = [jnp.ones(shape) for shape in shapes]
    _, pull = jax.vjp(lambda *a: selective_scan(*a, None, 16)[0], *inputs)
    largest = max(leaf.size for leaf in jax.tree.leaves(pull))
    assert largest <= 256 * 16  # tokens times states would be 256 * 8 * 16


@pytest.mark.parametrize("sizes", [(1,) * 11, (6, 1, 4)])
def test_steps_equal_the_whole(x, sizes):
    mixer = Mamba(state=5, chunk=4)
    params = drawn(mixer, x, Context())
    cache = mixer.init_cache(2, 99, WIDTH)
    size = sum(leaf.size for leaf in jax.tree.leaves(cache))
    step = jax.jit(functools.partial(mixer.apply, method="step"))
    pieces = []
    for piece in jnp.split(x, np.cumsum(sizes)[:-1], axis=1):
        y, cache = step(params, piece, cache, Context())
        pieces.append(y)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), run(mixer, params, x), rtol=1e-4, atol=1e-5)
    assert int(cache.written) == 11
    assert sum(leaf.size for leaf in jax.tree.leaves(cache)) == size


@pytest.mark.slow
def test_packed_documents_and_padding_equal_separate_ones(x):
    mixer = Mamba(state=5, chunk=4)
    params = drawn(mixer, x, Context())
    segments = jnp.array([[1] * 4 + [2] * 5 + [0] * 2] * 2)
    together = run(mixer, params, x, Context(segments=segments))
    np.testing.assert_allclose(together[:, :4], run(mixer, params, x[:, :4]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(together[:, 4:9], run(mixer, params, x[:, 4:9]), rtol=1e-4, atol=1e-5)
    # Left padding, as decoding has it: negative positions.
    positions = jnp.broadcast_to(jnp.arange(11)[None] - 3, (2, 11))
    y, _ = mixer.apply(params, x, mixer.init_cache(2, 1, WIDTH), Context(positions=positions), method="step")
    np.testing.assert_allclose(y[:, 3:], run(mixer, params, x[:, 3:]), rtol=1e-4, atol=1e-5)


def test_initial_values_are_the_papers(x):
    mixer = Mamba()
    p = meta.unbox(mixer.init(jax.random.key(0), x, Context()))["params"]
    np.testing.assert_allclose(jnp.exp(p["A_log"]), np.broadcast_to(np.arange(1, 17), (16, 16)), rtol=1e-6)
    steps = np.asarray(jax.nn.softplus(p["step_size"]["bias"]))
    assert steps.min() >= 1e-3 * 0.999
    assert steps.max() <= 1e-1 * 1.001
    assert (p["D"] == 1).all()


def test_published_size():
    """Mamba-130M: 24 layers of 768 channels, state 16, a vocabulary of 50,280: 129,135,360 parameters."""
    model = LM(DecoderBlock(Mamba(), ffn=None), vocab=50_280, dim=768, depth=24, tied=True)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 129_135_360


def test_the_state_is_as_large_for_any_length():
    model = LM(DecoderBlock(Mamba(), ffn=None), vocab=50_280, dim=768, depth=24, tied=True)
    sizes = [jax.eval_shape(lambda slots=slots: model.init_cache(1, slots)) for slots in (1, 1_000_000)]
    assert sizes[0] == sizes[1]
    # Per layer 1536 inner channels with 16 numbers each and the last 3 inputs of the convolution.
    assert sum(leaf.size for leaf in jax.tree.leaves(sizes[0])) == 24 * (1536 * (16 + 3) + 1)


def test_every_parameter_and_cache_names_its_axes(x):
    boxed = jax.eval_shape(Mamba().init, jax.random.key(0), x, Context())["params"]
    for leaf in jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, meta.AxisMetadata)):
        assert len(leaf.names) == leaf.value.ndim
    cache = Mamba().init_cache(2, 1, WIDTH)
    axes = Mamba().cache_axes()
    for name in ("inputs", "hidden", "written"):
        assert len(getattr(axes, name)) == getattr(cache, name).ndim


def test_bfloat16_stays_near(x):
    mixer = Mamba(state=5)
    params = drawn(mixer, x, Context())
    low = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    y = run(mixer, low, x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), run(mixer, params, x), atol=0.1)


def test_composes_with_a_feed_forward_layer_and_refuses_what_it_cannot(x):
    model = LM(DecoderBlock(Mamba(state=4), Gated(12)), vocab=7, dim=WIDTH, depth=2)
    tokens = jnp.zeros((1, 5), jnp.int32)
    assert jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), tokens)[0]).shape == (1, 5, 7)
    mixer, context = Mamba(), Context(valid=jnp.ones((2, 11), bool))
    with pytest.raises(UsageError, match="by position alone"):
        mixer.init(jax.random.key(0), x, mixer.init_cache(2, 1, WIDTH), context, method="step")
