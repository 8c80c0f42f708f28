from math import erf

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.errors import UsageError
from effjax.mixers.context import Context
from effjax.mixers.focal_modulation import FocalModulation

X = jax.random.normal(jax.random.key(0), (2, 5, 4, 3))
gelu = np.vectorize(lambda x: 0.5 * x * (1 + erf(x / 2**0.5)))


def parameters(mixer, x=X, seed=1):
    shapes = meta.unbox(jax.eval_shape(mixer.init, jax.random.key(0), x, Context()))["params"]
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(draw.normal(size=s.shape) * 0.5, s.dtype), shapes)


def project(x, part):
    return x @ np.asarray(part["kernel"], np.float64) + np.asarray(part["bias"], np.float64)


def by_equation(params, x, levels, kernel, averaged=False, norm=False):
    x = np.asarray(x, np.float64)
    z, gates = project(x, params["contexts"]), project(x, params["gates"])
    total = 0.0
    for level in range(levels):
        k = np.asarray(params[f"levels_{level}"]["kernel"], np.float64)
        r = (kernel + 2 * level) // 2
        padded = np.pad(z, ((0, 0), (r, r), (r, r), (0, 0)))
        z = np.zeros_like(z)
        for i, j in np.ndindex(*z.shape[1:3]):
            z[:, i, j] = (padded[:, i : i + 2 * r + 1, j : j + 2 * r + 1] * k).sum((1, 2))
        z = gelu(z)
        total = total + gates[..., level, None] * z
    total = total + gates[..., levels, None] * gelu(z.mean((1, 2), keepdims=True))
    y = project(x, params["queries"]) * project(total / (levels + 1 if averaged else 1), params["modulator"])
    if norm:
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
        y = y * np.asarray(params["norm"]["scale"]) + np.asarray(params["norm"]["bias"])
    return project(y, params["projection"])


@pytest.mark.parametrize(
    "fields", [{}, dict(levels=3, kernel=1, averaged=True), dict(levels=1, kernel=5, norm="layer")]
)
def test_the_equations(fields):
    mixer = FocalModulation(**fields)
    params = parameters(mixer)
    expected = by_equation(
        params, X, mixer.levels, mixer.kernel, averaged=mixer.averaged, norm=mixer.norm is not None
    )
    y = jax.jit(mixer.apply)({"params": params}, X, Context())
    np.testing.assert_allclose(y, expected, atol=2e-4 * np.abs(expected).max())


def gated(params, values):
    """The same parameters with gates that are constants."""
    gates = {"kernel": jnp.zeros_like(params["gates"]["kernel"]), "bias": jnp.asarray(values, jnp.float32)}
    return {**params, "gates": gates}


def test_with_the_gate_of_everything_alone_all_places_have_one_modulator():
    """A projection out of `q m` that is the identity and a query of ones show the modulator itself."""
    mixer = FocalModulation()
    params = gated(parameters(mixer), [0.0, 0.0, 1.0])
    ones = {"kernel": jnp.zeros((3, 3)), "bias": jnp.ones(3)}
    params = {**params, "queries": ones, "projection": {"kernel": jnp.eye(3), "bias": jnp.zeros(3)}}
    modulator = mixer.apply({"params": params}, X, Context())
    np.testing.assert_allclose(modulator, jnp.broadcast_to(modulator[:, :1, :1], X.shape), atol=1e-6)
    near = mixer.apply({"params": gated(params, [1.0, 0.0, 0.0])}, X, Context())
    assert float(jnp.ptp(near, axis=(1, 2)).min()) > 1e-2


def test_a_modulator_of_ones_leaves_two_projections():
    mixer = FocalModulation()
    params = parameters(mixer)
    params = {**params, "modulator": {"kernel": jnp.zeros((3, 3)), "bias": jnp.ones(3)}}
    expected = project(project(np.asarray(X, np.float64), params["queries"]), params["projection"])
    np.testing.assert_allclose(mixer.apply({"params": params}, X, Context()), expected, atol=1e-5)


@pytest.mark.parametrize(("level", "reach"), [(0, 1), (1, 3), (2, 6)])
def test_a_level_sees_as_far_as_the_sum_of_its_kernels(level, reach):
    """The Jacobian of the middle place, through the gate of one level alone: kernels 3, 5, 7."""
    mixer = FocalModulation(levels=3)
    x = jax.random.normal(jax.random.key(4), (1, 15, 15, 2))
    params = gated(parameters(mixer, x), np.eye(4)[level])
    row = jax.jit(jax.grad(lambda x: mixer.apply({"params": params}, x, Context())[0, 7, 7].sum()))(x)[0]
    seen = np.abs(np.asarray(row)).sum(-1) > 0
    expected = np.zeros((15, 15), bool)
    expected[7 - reach : 8 + reach, 7 - reach : 8 + reach] = True
    np.testing.assert_array_equal(seen, expected)


def test_gradients_are_those_of_finite_differences():
    mixer = FocalModulation()
    params = parameters(mixer)
    target = np.random.default_rng(5).normal(size=X.shape)

    def exact(params):
        return float((by_equation(params, X, 2, 3) * target).sum())

    def loss(params):
        return jnp.sum(mixer.apply({"params": params}, X, Context()) * jnp.float32(target))

    gradient = jax.jit(jax.grad(loss))(params)
    draw = np.random.default_rng(6)
    step = jax.tree.map(lambda p: draw.normal(size=p.shape), params)
    ahead, behind = (
        exact(jax.tree.map(lambda p, d, s=sign: np.float64(p) + s * 1e-5 * d, params, step))
        for sign in (1, -1)
    )
    along = sum(
        np.sum(np.asarray(g) * d) for g, d in zip(*map(jax.tree.leaves, (gradient, step)), strict=True)
    )
    np.testing.assert_allclose(along, (ahead - behind) / 2e-5, rtol=1e-3)


@pytest.mark.parametrize("fields", [dict(kernel=4), dict(growth=1)])
def test_kernels_without_a_middle_are_refused(fields):
    with pytest.raises(UsageError, match="without a middle"):
        FocalModulation(**fields)
