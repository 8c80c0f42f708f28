import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from effjax.errors import UsageError
from effjax.layers.depthwise import depthwise_conv
from effjax.mixers.context import Context
from effjax.mixers.large_small import LargeSmall, aggregate

# Whole networks: the whole suite has time for them.
pytestmark = pytest.mark.slow

KEYS = jax.random.split(jax.random.key(0), 4)
X = jax.random.normal(KEYS[0], (2, 5, 4, 8))


def weights(side, groups):
    return jax.random.normal(KEYS[1], (*X.shape[:3], side**2, groups))


@pytest.mark.parametrize(("side", "groups"), [(3, 2), (3, 8), (5, 1)])
def test_aggregation_is_the_sum_over_neighbours(side, groups):
    w = weights(side, groups)
    x, taps = np.asarray(X, np.float64), np.asarray(w, np.float64)
    expected = np.zeros_like(x)
    for b, i, j, c in np.ndindex(x.shape):
        for tap, (u, v) in enumerate(np.ndindex(side, side)):
            row, column = i + u - side // 2, j + v - side // 2
            if 0 <= row < x.shape[1] and 0 <= column < x.shape[2]:
                expected[b, i, j, c] += taps[b, i, j, tap, c % groups] * x[b, row, column, c]
    np.testing.assert_allclose(aggregate(X, w), expected, rtol=1e-4, atol=1e-5)


def test_the_same_weights_everywhere_make_an_ordinary_convolution():
    kernel = jax.random.normal(KEYS[2], (3, 3, 4))
    w = jnp.broadcast_to(kernel.reshape(1, 1, 1, 9, 4), (*X.shape[:3], 9, 4))
    expected = depthwise_conv(X, jnp.tile(kernel, (1, 1, 2)))
    np.testing.assert_allclose(aggregate(X, w), expected, rtol=1e-5, atol=1e-5)


def test_gradients_of_aggregation_are_finite_differences():
    check_grads(jax.jit(aggregate), (X, weights(3, 2)), order=1, modes=["rev"], rtol=1e-2, atol=1e-2)


def test_the_gradient_keeps_no_neighbourhoods():
    _, transposed = jax.vjp(aggregate, X, weights(3, 2))
    assert sum(leaf.size for leaf in jax.tree.leaves(transposed)) <= X.size + weights(3, 2).size


def test_weights_have_zero_mean_and_unit_variance_over_places_and_taps_and_the_mixer_learns():
    mixer = LargeSmall(share=4)
    variables = mixer.init(KEYS[3], X, Context())
    _, state = mixer.apply(variables, X, Context(), capture_intermediates=True, mutable=["intermediates"])
    w = state["intermediates"]["weigh_norm"]["__call__"][0]
    assert w.shape == (2, 5, 4, 9, 2)
    np.testing.assert_allclose(jnp.mean(w, (1, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(jnp.var(w, (1, 2, 3)), 1, rtol=1e-2)
    loss = lambda v: jnp.sum(mixer.apply(v, X, Context(), train=True, mutable=["batch_stats"])[0] ** 3)
    gradients = jax.tree.leaves(jax.grad(loss)(variables)["params"])
    assert all(jnp.isfinite(g).all() and jnp.any(g != 0) for g in gradients[:4])


def test_channels_that_make_no_groups_are_refused():
    with pytest.raises(UsageError, match="6 channels do not divide into groups of share=8"):
        LargeSmall().init(KEYS[3], X[..., :6], Context())
