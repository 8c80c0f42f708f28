"""Routers of layers: what they read, and how large they are."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.decoding.layer_router import LayerRouter, window_means
from effjax.errors import UsageError


def means_by_hand(x, windows):
    """Of one row: what stands behind the last whole window is left out."""
    count = min(windows, len(x))
    size = len(x) // count
    return x[: count * size].reshape(count, size, -1).mean(axis=1)


@pytest.mark.parametrize("tokens", [1, 5, 8, 19])
def test_windows_are_runs_of_tokens(draw, tokens):
    x = draw.normal(size=(2, tokens, 3))
    found, there = window_means(jnp.float32(x), jnp.ones((2, tokens), bool), 8)
    for row in range(2):
        expected = means_by_hand(x[row], 8)
        assert there[row].sum() == len(expected)
        np.testing.assert_allclose(found[row][: len(expected)], expected, rtol=1e-5, atol=1e-6)
        assert not np.any(found[row][len(expected) :])


def test_one_window_is_the_mean(draw):
    x = draw.normal(size=(3, 7, 4))
    found, there = window_means(jnp.float32(x), jnp.ones((3, 7), bool), 1)
    np.testing.assert_allclose(found[:, 0], x.mean(axis=1), rtol=1e-5, atol=1e-6)
    assert there.all()


def test_what_is_not_read_does_not_count(draw):
    """Padding in front and answers behind: as if the row were as short as what is read."""
    x = draw.normal(size=(1, 12, 3))
    reads = (jnp.arange(12) >= 2) & (jnp.arange(12) < 11)
    found, there = window_means(jnp.float32(x), reads[None], 4)
    np.testing.assert_allclose(found[0], means_by_hand(x[0, 2:11], 4), rtol=1e-5, atol=1e-6)
    assert there.all()


def test_a_router_is_the_mean_over_windows_of_a_bottleneck(draw):
    router, x = LayerRouter(windows=3, bottleneck=5), draw.normal(size=(2, 10, 4))
    reads = jnp.ones((2, 10), bool)
    shapes = meta.unbox(jax.eval_shape(router.init, jax.random.key(0), jnp.float32(x), reads))
    params = jax.tree.map(lambda leaf: draw.normal(size=leaf.shape), shapes["params"])
    held = jax.tree.map(jnp.float32, params)
    found = jax.jit(router.apply)({"params": held}, jnp.float32(x), reads)
    for row in range(2):
        h = means_by_hand(x[row], 3) @ params["expand"]["kernel"] + params["expand"]["bias"]
        h = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        z = h @ params["contract"]["kernel"] + params["contract"]["bias"]
        np.testing.assert_allclose(found[row], z.mean(axis=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("depth", "width", "expected"), [(28, 3072, 11_024_468), (32, 4096, 16_793_696)])
def test_routers_have_the_published_size(depth, width, expected):
    x, reads = jnp.zeros((1, 2, width)), jnp.ones((1, 2), bool)
    shapes = jax.eval_shape(LayerRouter().init, jax.random.key(0), x, reads)
    assert depth * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == expected


def test_no_gradient_leaves_a_router(draw):
    router, x, reads = LayerRouter(2, 3), jnp.float32(draw.normal(size=(1, 4, 3))), jnp.ones((1, 4), bool)
    params = router.init(jax.random.key(0), x, reads)
    into_x = jax.grad(lambda x: router.apply(params, x, reads).sum())(x)
    assert not np.any(into_x)


def test_bad_sizes_are_named():
    with pytest.raises(UsageError, match="windows=0 must be at least 1"):
        LayerRouter(windows=0)
    with pytest.raises(UsageError, match="bottleneck=0 must be at least 1"):
        LayerRouter(bottleneck=0)
