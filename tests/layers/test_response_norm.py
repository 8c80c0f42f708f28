import jax
import jax.numpy as jnp
import numpy as np

from effjax.layers.response_norm import GlobalResponseNorm

X = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
PARAMS = {"scale": jnp.linspace(-1, 2, 5), "bias": jnp.linspace(0.5, -0.5, 5)}


def test_equals_its_equation():
    x, gamma, beta = (np.asarray(a, np.float64) for a in (X, PARAMS["scale"], PARAMS["bias"]))
    expected = np.zeros_like(x)
    for b in range(2):
        size = np.array([np.sqrt(sum(x[b, i, j, c] ** 2 for i, j in np.ndindex(3, 4))) for c in range(5)])
        response = size / (size.mean() + 1e-6)
        for i, j in np.ndindex(3, 4):
            expected[b, i, j] = gamma * x[b, i, j] * response + beta + x[b, i, j]
    np.testing.assert_allclose(GlobalResponseNorm().apply({"params": PARAMS}, X), expected, rtol=1e-5)


def test_a_map_of_zeros_has_a_finite_gradient():
    loss = lambda x: jnp.sum(GlobalResponseNorm().apply({"params": PARAMS}, x))
    np.testing.assert_allclose(jax.grad(loss)(jnp.zeros_like(X)), 1.0)
