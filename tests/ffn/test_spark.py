import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.errors import UsageError
from effjax.ffn import Gated, SparkFFN

X = jax.random.normal(jax.random.key(0), (2, 3, 16))
SPARK = SparkFFN(hidden=192, predictor=6, active=16)


def params_of(module=SPARK):
    return meta.unbox(jax.jit(module.init)(jax.random.key(1), X))["params"]


def turned(params):
    return {n: {"kernel": p["kernel"] if n == "contract" else p["kernel"].T} for n, p in params.items()}


def by_hand(params, x, k):
    """Token by token; 1.3829941271006392 is the quantile of 1 - 16/192."""
    w = {name: np.asarray(p["kernel"], np.float64) for name, p in params.items()}
    out = np.zeros(x.shape)
    for at in np.ndindex(x.shape[:-1]):
        token = np.asarray(x[at], np.float64)
        scores = token[:6] @ w["gate"]
        theta = scores.mean() + scores.std() * 1.3829941271006392
        for f in np.flatnonzero(scores > theta):
            s = scores[f] - theta
            gelu = 0.5 * s * (1 + np.tanh(np.sqrt(2 / np.pi) * (s + 0.044715 * s**3)))
            out[at] += gelu * (token[6:] @ w["expand"][:, f]) * w["contract"][f]
    return out


def test_is_its_equation():
    params = params_of()
    expected = by_hand(params, X, 16)
    assert np.abs(expected).max() > 0.02
    np.testing.assert_allclose(jax.jit(SPARK.apply)({"params": params}, X), expected, rtol=1e-4, atol=1e-5)


def test_masked_and_gathered_agree():
    params = params_of()
    masked = jax.jit(SPARK.apply)({"params": params}, X)
    rows = jax.jit(SPARK.clone(by_rows=True).apply)
    np.testing.assert_allclose(rows({"params": turned(params)}, X), masked, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        rows({"params": turned(params)}, X[1:, 2:]), masked[1:, 2:], rtol=1e-4, atol=1e-5
    )


def test_as_many_parameters_as_the_gated_perceptron_of_two_thirds_the_neurons():
    count = lambda module: sum(leaf.size for leaf in jax.tree.leaves(params_of(module)))
    assert count(SPARK) == count(Gated(128)) == 3 * 16 * 128
    assert count(SPARK.clone(predictor=1)) == count(SPARK)


def test_all_active_draws_no_threshold():
    params, spark = params_of(), SPARK.clone(active=192)
    w = {name: p["kernel"] for name, p in params.items()}
    gate = jax.nn.gelu(X[..., :6] @ w["gate"])
    expected = (gate * (X[..., 6:] @ w["expand"])) @ w["contract"]
    np.testing.assert_allclose(jax.jit(spark.apply)({"params": params}, X), expected, rtol=1e-4, atol=1e-5)


def test_trains_in_either_form_alike():
    def loss(params, module):
        return jnp.sum(jnp.sin(module.apply({"params": params}, X[:1, :1], train=True)))

    slope = jax.jit(jax.grad(loss), static_argnums=1)
    params = params_of()
    masked, rows = slope(params, SPARK), slope(turned(params), SPARK.clone(by_rows=True))
    for one, other in zip(jax.tree.leaves(turned(masked)), jax.tree.leaves(rows), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
        assert np.abs(one).max() > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(active=0), "active=0 of hidden=192"),
        (dict(active=193), "active=193 of hidden=192"),
        (dict(predictor=16), "predictor=16 of 16 channels"),
        (dict(predictor=0), "predictor=0 of 16 channels"),
    ],
)
def test_a_wrong_definition_is_one_clear_message(fields, message):
    with pytest.raises(UsageError, match=message):
        SparkFFN(**{**dict(hidden=192, predictor=6, active=16), **fields}).init(jax.random.key(0), X)
