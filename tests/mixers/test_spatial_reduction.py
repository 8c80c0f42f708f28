import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.errors import UsageError
from effjax.mixers import Attention, SpatialReduction
from effjax.mixers.context import Context

X = np.random.default_rng(0).normal(size=(2, 5, 4, 6)).astype(np.float32)


def drawn(mixer, x=X):
    shapes = meta.unbox(jax.eval_shape(mixer.init, jax.random.key(0), x, Context()))
    draw = np.random.default_rng(1)
    return jax.tree.map(lambda s: (0.5 * draw.normal(size=s.shape)).astype(np.float32), shapes)


def run(mixer):
    return jax.jit(lambda variables, x: mixer.apply(variables, x, Context()))


def by_loops(params, x, heads, r):
    """A place at a time, in float64; the fifth row is no whole square and gives no key."""
    p = jax.tree.map(np.float64, params)
    batch, height, width, channels = x.shape
    keys, values = [], []
    for b, i, j in np.ndindex(batch, height // r, width // r):
        square = x[b, r * i : r * (i + 1), r * j : r * (j + 1)].ravel()
        z = square @ p["reduce"]["projection"]["kernel"] + p["reduce"]["projection"]["bias"]
        z = (z - z.mean()) / np.sqrt(z.var() + 1e-6) * p["reduced_norm"]["scale"] + p["reduced_norm"]["bias"]
        for name, into in (("key", keys), ("value", values)):
            into.append(np.einsum("c,chd->hd", z, p[name]["kernel"]) + p[name]["bias"])
    keys, values = (np.reshape(a, (batch, -1, heads, channels // heads)) for a in (keys, values))
    y = np.zeros(x.shape)
    for b, i, j in np.ndindex(batch, height, width):
        q = np.einsum("c,chd->hd", x[b, i, j], p["query"]["kernel"]) + p["query"]["bias"]
        for h in range(heads):
            weights = np.exp(keys[b, :, h] @ q[h] / np.sqrt(channels / heads))
            mixed = weights @ values[b, :, h] / weights.sum()
            y[b, i, j] += mixed @ p["output"]["kernel"][h]
    return y + p["output"]["bias"]


def test_it_is_attention_to_projected_squares():
    mixer = SpatialReduction(heads=3, reduction=2)
    held = drawn(mixer)
    np.testing.assert_allclose(
        run(mixer)(held, X), by_loops(held["params"], np.float64(X), 3, 2), rtol=1e-4, atol=1e-5
    )


def test_without_reduction_it_is_attention():
    mixer = SpatialReduction(heads=3)
    held = drawn(mixer)
    assert set(held["params"]) == {"query", "key", "value", "output"}
    np.testing.assert_allclose(run(mixer)(held, X), run(Attention(3))(held, X), rtol=1e-5, atol=1e-5)


def test_its_gradient_is_that_of_finite_differences():
    mixer = SpatialReduction(heads=2, reduction=2)
    held = drawn(mixer)
    toward = np.random.default_rng(2).normal(size=X.shape).astype(np.float32)

    @jax.jit
    def along(t):
        return jnp.sum(jnp.sin(mixer.apply(held, X + t * toward, Context())))

    slope = (along(1e-2) - along(-1e-2)) / 2e-2
    np.testing.assert_allclose(jax.jit(jax.grad(along))(0.0), slope, rtol=1e-2)


def test_what_does_not_fit_is_said():
    with pytest.raises(UsageError, match="heads=4 does not divide the width 6"):
        drawn(SpatialReduction(heads=4))
    with pytest.raises(UsageError, match="a map of 5 x 4 is smaller than a square of reduction=8"):
        drawn(SpatialReduction(heads=2, reduction=8))
