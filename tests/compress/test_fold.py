import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress import fold
from effjax.errors import UsageError
from effjax.layers.conv import Conv
from effjax.layers.dense import Dense
from effjax.layers.depthwise import depthwise_conv
from effjax.layers.norms import norm

KEYS = jax.random.split(jax.random.key(0), 8)
X = jax.random.normal(KEYS[0], (2, 9, 10, 4))
NORM = norm("batch", 1e-3, "norm")


def trained_norm(channels):
    """Parameters and statistics of a batch norm that has seen something."""
    draw = jax.random.split(KEYS[1], 4)
    params = {
        "scale": jax.random.normal(draw[0], (channels,)),
        "bias": jax.random.normal(draw[1], (channels,)),
    }
    statistics = {
        "mean": jax.random.normal(draw[2], (channels,)),
        "var": jax.random.uniform(draw[3], (channels,), minval=0.1),
    }
    return params, statistics


def normed(x, params, statistics):
    return NORM.apply({"params": params, "batch_stats": statistics}, x)


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize(
    "layer", [lambda b: Conv(6, 3, 2, groups=2, use_bias=b), lambda b: Dense(6, ("i", "o"), use_bias=b)]
)
def test_a_norm_behind_a_layer_becomes_part_of_it(layer, use_bias):
    params = layer(use_bias).init(KEYS[2], X)["params"]
    params = {name: jax.random.normal(KEYS[3], leaf.value.shape) for name, leaf in params.items()}
    trained = trained_norm(6)
    expected = normed(layer(use_bias).apply({"params": params}, X), *trained)
    folded = fold.affine_behind(params, fold.batch_norm(*trained, 1e-3))
    np.testing.assert_allclose(layer(True).apply({"params": folded}, X), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("features", [6, (3, 2)])
@pytest.mark.parametrize("use_bias", [False, True])
def test_a_norm_before_a_projection_becomes_part_of_it(features, use_bias):
    axes = ("i", "o") if features == 6 else ("i", "heads", "o")
    layer = Dense(features, axes, use_bias=use_bias)
    params = layer.init(KEYS[2], X)["params"]
    params = {name: jax.random.normal(KEYS[3], leaf.value.shape) for name, leaf in params.items()}
    trained = trained_norm(4)
    expected = layer.apply({"params": params}, normed(X, *trained))
    folded = fold.affine_before(params, fold.batch_norm(*trained, 1e-3))
    ours = Dense(features, axes).apply({"params": folded}, X)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_a_dilated_kernel_is_one_with_zeros_between_its_taps(dilation):
    kernel = jax.random.normal(KEYS[4], (3, 3, 4))
    dense = fold.dense_form(kernel, dilation)
    assert dense.shape == (2 * dilation + 1, 2 * dilation + 1, 4)
    np.testing.assert_array_equal(dense[::dilation, ::dilation], kernel)
    assert float(jnp.sum(dense != 0)) == kernel.size
    expected = depthwise_conv(X, kernel, dilation=dilation)
    np.testing.assert_allclose(depthwise_conv(X, dense), expected, rtol=1e-5, atol=1e-5)


def test_layers_side_by_side_are_the_sum_of_their_kernels():
    large, small = jax.random.normal(KEYS[5], (5, 5, 4)), jax.random.normal(KEYS[6], (3, 3, 4))
    bias = jnp.arange(4.0)
    layers = [{"kernel": large, "bias": bias}, {"kernel": small}, fold.identity(4)]
    merged = fold.side_by_side(layers, 5)
    expected = depthwise_conv(X, large) + depthwise_conv(X, small) + X + bias[None, None, None]
    ours = depthwise_conv(X, merged["kernel"]) + merged["bias"][None, None, None]
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
    assert set(fold.side_by_side(layers[1:], 3)) == {"kernel"}


@pytest.mark.parametrize("side", [3, 6])
def test_a_kernel_that_cannot_stand_in_the_middle_is_refused(side):
    with pytest.raises(UsageError, match=f"5 x 5 has no place in the middle of {side} x {side}"):
        fold.grown(jnp.ones((5, 5, 2)), side)
