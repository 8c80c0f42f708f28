import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.ffn import CATS, Gated

X = jax.random.normal(jax.random.key(0), (2, 3, 8))
F = 300


def params_of(module=None):
    return meta.unbox((module or Gated(F)).init(jax.random.key(1), X))["params"]


def turned(params):
    return {n: {"kernel": p["kernel"] if n == "contract" else p["kernel"].T} for n, p in params.items()}


def apply(params, x, threshold, **fields):
    module = CATS(F, **fields)
    return jax.jit(module.apply)({"params": params, "thresholds": {"threshold": jnp.float32(threshold)}}, x)


def by_hand(params, x, threshold):
    w = {name: np.asarray(p["kernel"], np.float64) for name, p in params.items()}
    x = np.asarray(x, np.float64)
    gate = x @ w["gate"]
    gate = gate / (1 + np.exp(-gate))
    gate[np.abs(gate) < threshold] = 0.0
    return (gate * (x @ w["expand"])) @ w["contract"], np.mean(gate == 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_without_a_threshold_it_is_the_dense_perceptron_to_the_bit(dtype):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params_of())
    x = X.astype(dtype)
    dense = jax.jit(Gated(F).apply)({"params": params}, x)
    np.testing.assert_array_equal(apply(params, x, 0.0), dense)


@pytest.mark.parametrize("threshold", [0.05, 0.15])
def test_small_gates_are_left_out_and_large_ones_of_either_sign_kept(threshold):
    params = params_of()
    expected, share = by_hand(params, X, threshold)
    assert 0.05 < share < 0.95
    np.testing.assert_allclose(apply(params, X, threshold), expected, rtol=1e-4, atol=1e-5)
    dense, _ = by_hand(params, X, 0.0)
    assert np.abs(dense - expected).max() > 1e-2


@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.3, 1e3])
def test_masked_and_gathered_agree(threshold):
    params = params_of()
    masked = apply(params, X, threshold)
    np.testing.assert_allclose(
        apply(turned(params), X, threshold, by_rows=True), masked, rtol=1e-4, atol=1e-5
    )  # several tokens: masked, from rows
    for token in (X[:1, :1], X[0, 0]):
        np.testing.assert_allclose(
            apply(turned(params), token, threshold, by_rows=True),
            masked[0, 0].reshape(token.shape),
            rtol=1e-4,
            atol=1e-5,
        )


def test_threshold_is_no_parameter_and_axes_have_names():
    boxed = CATS(F, by_rows=True).init(jax.random.key(1), X)
    assert boxed["thresholds"]["threshold"].shape == ()
    assert set(boxed["params"]) == {"gate", "expand", "contract"}
    assert all(layer["kernel"].names == ("mlp", "embed") for layer in boxed["params"].values())
    assert jax.tree.map(jnp.shape, params_of(CATS(F))) == jax.tree.map(jnp.shape, params_of())


def test_gradients_reach_kept_neurons_alone():
    params = params_of()

    def loss(params):
        variables = {"params": params, "thresholds": {"threshold": jnp.float32(0.3)}}
        return jnp.sum(jnp.sin(CATS(F, by_rows=True).apply(variables, X[:1, :1], train=True)))

    gradient = jax.jit(jax.grad(loss))(turned(params))
    gate = jax.nn.silu(X[0, 0] @ params["gate"]["kernel"])
    reached = np.abs(gradient["contract"]["kernel"]).sum(1) > 0
    np.testing.assert_array_equal(reached, np.abs(gate) >= 0.3)
