"""Token-parameter attention against loops, and what its weights promise."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.layers.pattention import Pattention, weigh


def by_loops(x, keys, values, theta, tau):
    """The three equations, number by number in float64."""
    out = np.zeros((len(x), values.shape[1]))
    for row, vector in enumerate(x):
        scores = [sum(a * b for a, b in zip(vector, key, strict=True)) for key in keys]
        gelu = lambda s: s * 0.5 * (1 + math.erf(s / math.sqrt(2)))
        length = lambda numbers: math.sqrt(sum(n * n for n in numbers))
        if theta == "norm_gelu":
            weights = [gelu(tau * s / length(scores)) for s in scores]
        elif theta == "gelu_norm":
            bent = [gelu(s) for s in scores]
            weights = [tau * b / length(bent) for b in bent]
        else:
            total = sum(math.exp(s) for s in scores)
            weights = [tau**2 * math.exp(s) / total for s in scores]
        for weight, value in zip(weights, values, strict=True):
            out[row] += weight * value
    return out


@pytest.mark.parametrize("theta", ["norm_gelu", "gelu_norm", "softmax"])
@pytest.mark.parametrize("scale_slots", [None, 3])
def test_it_is_the_equation(theta, scale_slots, draw):
    x, keys, values = (draw.normal(size=shape) for shape in [(5, 4), (7, 4), (7, 6)])
    variables = {"params": {"keys": {"kernel": keys.T}, "values": {"kernel": values}}}
    layer = Pattention(6, 7, theta=theta, scale_slots=scale_slots)
    found = layer.apply(jax.tree.map(jnp.float32, variables), jnp.float32(x))
    expected = by_loops(x, keys, values, theta, math.sqrt(scale_slots or 7))
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_parameter_tokens_have_no_order(draw):
    x = jnp.float32(draw.normal(size=(3, 2, 4)))
    layer = Pattention((2, 3), 6, ("heads", "head_dim", "heads", "head_dim"), inputs=2)
    params = jax.tree.map(lambda leaf: leaf.value, layer.init(jax.random.key(0), x)["params"], is_leaf=boxed)
    order = jnp.array([3, 0, 5, 1, 4, 2])
    moved = {
        "keys": {"kernel": params["keys"]["kernel"][..., order]},
        "values": {"kernel": params["values"]["kernel"][order]},
    }
    assert layer.apply({"params": params}, x).shape == (3, 2, 3)
    np.testing.assert_allclose(
        *(layer.apply({"params": p}, x) for p in (params, moved)), rtol=1e-5, atol=1e-7
    )


def boxed(leaf):
    return hasattr(leaf, "names")


@pytest.mark.parametrize("theta", ["norm_gelu", "gelu_norm"])
def test_a_score_of_zero_has_no_weight_and_is_not_seen(theta, draw):
    scores = jnp.float32(draw.normal(size=(4, 5)))
    longer = jnp.pad(scores, ((0, 0), (0, 3)))
    weights = weigh(longer, theta, 2.0)
    np.testing.assert_allclose(weights[:, :5], weigh(scores, theta, 2.0), rtol=1e-6)
    assert not weights[:, 5:].any()


def test_tau_that_grows_is_a_factor_behind_gelu_and_none_before_it(draw):
    scores = jnp.float32(draw.normal(size=(4, 6)))
    one, two = (weigh(scores, "gelu_norm", slots**0.5) for slots in (6, 24))
    np.testing.assert_allclose(two, 2 * one, rtol=1e-6)
    one, two = (weigh(scores, "norm_gelu", slots**0.5) for slots in (6, 24))
    assert np.ptp(two / one) > 0.1


@pytest.mark.parametrize("theta", ["norm_gelu", "gelu_norm", "softmax"])
def test_slopes_are_finite_differences_in_float64(theta, draw):
    # Wide scores, and such that the addend to the squared norm rules: next to a row of zeros.
    for scale, step in [(1.0, 1e-6), (1e-6, 1e-11)]:
        scores, along, seen = (draw.normal(size=(2, 6)) for _ in range(3))
        scores = scores * scale
        with jax.enable_x64(True):
            value = lambda s: jnp.sum(weigh(s, theta, 2.0) * seen)  # noqa: B023
            slope = jnp.sum(jax.grad(value)(jnp.asarray(scores)) * along)
            ahead, behind = (value(jnp.asarray(scores + sign * step * along)) for sign in (1, -1))
            np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=1e-4)


@pytest.mark.parametrize("theta", ["norm_gelu", "gelu_norm"])
def test_a_row_of_zeros_has_a_slope(theta):
    slope = jax.jacobian(lambda s: weigh(s, theta, 2.0))(jnp.zeros(3))
    # tau / sqrt(1e-10) and the slope of gelu at 0, a half.
    np.testing.assert_allclose(slope, jnp.eye(3) * 1e5, rtol=1e-5)
