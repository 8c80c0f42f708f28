"""Short Hyena operators against the sums of their equations, and what a token sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.errors import UsageError
from effjax.mixers.context import Context
from effjax.mixers.hyena import Hyena

KINDS = {"se": Hyena(inner=4), "x": Hyena(), "y": Hyena(features=None, inner=4)}
X = np.random.default_rng(0).normal(size=(2, 7, 3))


def randomised(mixer, x=X):
    shapes = meta.unbox(jax.eval_shape(mixer.init, jax.random.key(0), jnp.asarray(x, jnp.float32), Context()))
    draw = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: draw.normal(size=leaf.shape), shapes["params"])


def run(mixer, params, x):
    return jax.jit(lambda p, x: mixer.apply({"params": p}, x, Context()))(params, x)


def filtered(u, kernel, bias):
    """One token and channel after another, in float64."""
    y = np.zeros_like(u) + bias
    for n, j in np.ndindex(u.shape[0], kernel.shape[0]):
        back = kernel.shape[0] - 1 - j
        if n >= back:
            y[n] += kernel[j] * u[n - back]
    return y


def reference(p, x):
    u = np.einsum("nc,cpd->npd", x, p["project"]["kernel"]) + p["project"]["bias"]
    if "feature_kernel" in p:
        u = np.stack(
            [filtered(u[:, i], p["feature_kernel"][:, i], p["feature_bias"][i]) for i in range(3)], 1
        )
    q, k, v = u[:, 0], u[:, 1], u[:, 2]
    v = k * v
    if "inner_kernel" in p:
        v = filtered(v, p["inner_kernel"], p["inner_bias"])
    return (q * v) @ p["output"]["kernel"] + p["output"]["bias"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_its_equation(kind):
    params = randomised(KINDS[kind])
    got = run(KINDS[kind], jax.tree.map(jnp.float32, params), jnp.float32(X))
    np.testing.assert_allclose(got, [reference(params, x) for x in X], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(("kind", "reach"), [("se", 7), ("x", 4), ("y", 4)])
def test_a_token_sees_those_before_it_as_far_as_the_filters_reach(kind, reach):
    params = jax.tree.map(jnp.float32, randomised(KINDS[kind], np.zeros((1, 12, 3))))
    slope = jax.jacobian(lambda x: run(KINDS[kind], params, x[None])[0, 9].sum())
    seen = jnp.any(slope(jnp.asarray(np.random.default_rng(2).normal(size=(12, 3)), jnp.float32)) != 0, 1)
    np.testing.assert_array_equal(seen, [9 - reach < n <= 9 for n in range(12)])


def test_the_inner_filter_starts_as_the_identity():
    se = Hyena(inner=4)
    params = meta.unbox(jax.jit(se.init)(jax.random.key(0), jnp.float32(X), Context()))["params"]
    without = {name: leaf for name, leaf in params.items() if not name.startswith("inner")}
    np.testing.assert_allclose(run(se, params, jnp.float32(X)), run(Hyena(), without, jnp.float32(X)))
    assert 0.4 < np.max(np.abs(params["feature_kernel"])) <= 0.5


def test_a_map_is_its_rows_one_behind_the_other():
    x = jnp.float32(np.random.default_rng(3).normal(size=(1, 3, 4, 3)))
    params = jax.tree.map(jnp.float32, randomised(Hyena()))
    flat = run(Hyena(), params, x.reshape(1, 12, 3))
    np.testing.assert_array_equal(run(Hyena(), params, x), flat.reshape(x.shape))


def test_the_gradient_is_that_of_finite_differences():
    params = jax.tree.map(jnp.float32, randomised(KINDS["se"]))
    way = jax.tree.map(lambda leaf: jnp.float32(np.random.default_rng(4).normal(size=leaf.shape)), params)

    def value(step):
        moved = jax.tree.map(lambda leaf, move: leaf + step * move, params, way)
        return jnp.mean(jnp.tanh(0.05 * run(KINDS["se"], moved, jnp.float32(X))))

    step = 1e-2
    wanted = (value(step) - value(-step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(value)(0.0), wanted, rtol=2e-2)


def test_what_it_cannot_mix_is_refused():
    with pytest.raises(UsageError, match="needs one filter"):
        Hyena(features=None)
    with pytest.raises(UsageError, match="no segments"):
        Hyena().init(jax.random.key(0), jnp.ones((1, 4, 2)), Context(valid=jnp.ones((1, 4), bool)))
