"""Attention by proxy: its limits, what it costs, and that a drawn proxy has a gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.measure import count
from effjax.mixers.attention import Attention
from effjax.mixers.context import Context
from effjax.mixers.proxy_attention import ProxyAttention, proxies


def tokens(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def randomised(mixer, x):
    """Variables without zeros, so that every path counts."""
    shapes = meta.unbox(jax.eval_shape(mixer.init, jax.random.key(0), x))
    draw = np.random.default_rng(1)
    return jax.tree.map(lambda s: jnp.asarray(0.4 * draw.normal(size=s.shape), s.dtype), shapes)


def run(mixer, variables, x, key=None, train=False, **options):
    """One compiled call, with the randomness of a key where there is one."""

    @jax.jit
    def call(variables, x, key):
        rngs = {} if key is None else {"dropout": key}
        return mixer.apply(variables, x, train, rngs=rngs, **options)

    return call(variables, x, key)


def test_proxies_are_means_first_tokens_or_draws():
    x = tokens(2, 6, 4, 3)
    np.testing.assert_allclose(proxies(x, "mean"), np.asarray(x).mean(2), atol=1e-6)
    np.testing.assert_array_equal(proxies(x, "first"), x[:, :, 0])
    np.testing.assert_array_equal(proxies(x, "random"), x[:, :, 0])
    drawn = np.asarray(proxies(x, "random", jax.random.key(3)))
    places = [
        [np.flatnonzero((np.asarray(x[b, w]) == drawn[b, w]).all(-1)) for w in range(6)] for b in range(2)
    ]  # each is a token of its own window
    assert all(len(place) == 1 for row in places for place in row)
    assert len({int(place[0]) for row in places for place in row}) > 1
    np.testing.assert_array_equal(drawn, proxies(x, "random", jax.random.key(3)))


@pytest.mark.parametrize("choice", ["mean", "first", "random"])
def test_with_one_token_a_window_proxies_attend_as_all_tokens_do(choice):
    x, mixer = tokens(2, 7, 1, 8), ProxyAttention(heads=2, choice=choice)
    variables = randomised(mixer, x)
    got = run(mixer, variables, x, jax.random.key(5), True, method="interact")
    flat = x[:, :, 0]
    normed = (flat - flat.mean(-1, keepdims=True)) / jnp.sqrt(flat.var(-1, keepdims=True) + 1e-6)
    among = {"params": variables["params"]["among"]}
    want = flat + jax.jit(Attention(heads=2).apply)(among, normed, Context())
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_of_equal_tokens_it_does_not_matter_which_is_drawn():
    x = jnp.repeat(tokens(2, 6, 1, 8), 4, axis=2)
    variables = randomised(ProxyAttention(heads=2), x)
    drawing = ProxyAttention(heads=2, choice="random")
    mean = run(ProxyAttention(heads=2), variables, x)
    for k in range(2):
        np.testing.assert_allclose(run(drawing, variables, x, jax.random.key(k), True), mean, atol=1e-5)
    uneven = tokens(2, 6, 4, 8)
    one, other = (run(drawing, variables, uneven, jax.random.key(k), True) for k in range(2))
    assert np.abs(one - other).max() > 1e-3
    # Without training nothing is drawn.
    first = run(ProxyAttention(heads=2, choice="first"), variables, uneven)
    np.testing.assert_array_equal(run(drawing, variables, uneven, jax.random.key(0)), first)


def test_the_order_of_windows_does_not_matter():
    x, order = tokens(2, 6, 4, 8), np.array([3, 0, 5, 1, 4, 2])
    mixer = ProxyAttention(heads=2)
    variables = randomised(mixer, x)
    y = run(mixer, variables, x)
    np.testing.assert_allclose(run(mixer, variables, x[:, order]), y[:, order], atol=1e-5)


def test_it_starts_at_zero():
    x, mixer = tokens(1, 3, 4, 8), ProxyAttention(heads=2)
    np.testing.assert_array_equal(jax.jit(mixer.init_with_output)(jax.random.key(0), x)[0], 0.0)


@pytest.mark.parametrize("choice", ["mean", "random"])
def test_gradient_is_the_slope(choice):
    """Directional derivative through the gather; the key is given, so the draw is the same on both sides."""
    mixer, x, direction = ProxyAttention(heads=2, choice=choice), *tokens(2, 1, 4, 4, 8)
    variables = randomised(mixer, x)

    @jax.jit
    def value(x):
        y = mixer.apply(variables, x, train=True, rngs={"dropout": jax.random.key(2)})
        return jnp.sum(jnp.sin(y))

    step = 1e-2
    slope = (value(x + step * direction) - value(x - step * direction)) / (2 * step)
    assert float(jnp.vdot(jax.grad(value)(x), direction)) == pytest.approx(float(slope), rel=5e-3)


@pytest.mark.parametrize(("side", "window"), [(16, 2), (32, 4), (64, 8)])
def test_products_of_queries_and_keys_are_few(side, window):
    """1 / m^2 among the proxies and 1 / m to them, of the 2 N^2 C of attention among all."""
    n, m, dim = side**2, window**2, 16
    x = jax.ShapeDtypeStruct((1, n // m, m, dim), jnp.float32)
    mixer = ProxyAttention(heads=2)
    shapes = meta.unbox(jax.eval_shape(mixer.init, jax.random.key(0), x))
    cost = count(lambda p, x: mixer.apply({"params": p}, x), shapes["params"], x)
    assert cost.work_by_kind["attention"].macs == (n**2 // m**2 + n**2 // m) * 2 * dim
