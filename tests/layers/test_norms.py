import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.layers.norms import norm, norm_size, standardised

X = jax.random.normal(jax.random.key(0), (2, 3, 4, 6)) * 2 + 1


def made(*arguments, **options):
    module = norm(*arguments, **options)
    shapes = meta.unbox(jax.eval_shape(module.init, jax.random.key(0), X))
    draw = np.random.default_rng(1)
    return module, jax.tree.map(lambda leaf: np.float32(draw.normal(size=leaf.shape)), shapes)


@pytest.mark.parametrize(
    "kind", ["rms", "rms_offset", "layer", "layer_no_bias", "layer_plain", "layer_offset"]
)
def test_every_kind_is_its_equation(kind):
    module, params = made(kind, 1e-3, "norm")
    p = params.get("params", {})
    x = np.asarray(X, np.float64)
    if kind.startswith("layer"):
        x = x - x.mean(-1, keepdims=True)
    wanted = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3)
    wanted = wanted * (p.get("scale", 0 if "offset" in kind else 1) + ("offset" in kind)) + p.get("bias", 0)
    np.testing.assert_allclose(module.apply(params, X), wanted, rtol=1e-4, atol=1e-5)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == norm_size(kind, 6)


def test_the_usual_kinds_are_the_equations():
    x = np.asarray(X, np.float64)
    for kind, y in (("rms", x), ("layer", x - x.mean(-1, keepdims=True))):
        module, params = made(kind, 1e-5, "norm")
        held = {name: np.asarray(leaf, np.float64) for name, leaf in params["params"].items()}
        y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5) * held["scale"] + held.get("bias", 0)
        np.testing.assert_allclose(module.apply(params, X), y, rtol=1e-5, atol=1e-5)


def test_axes_that_are_reduced_and_axes_that_are_scaled():
    whole, params = made("rms", 0.0, "norm", 2, 2)
    assert params["params"]["scale"].shape == (4, 6)
    x = np.asarray(X, np.float64)
    wanted = x / np.sqrt((x**2).mean((-2, -1), keepdims=True)) * params["params"]["scale"]
    np.testing.assert_allclose(whole.apply(params, X), wanted, rtol=1e-4, atol=1e-5)
    each, _ = made("rms", 0.0, "norm", 1, 2)
    wanted = x / np.sqrt((x**2).mean(-1, keepdims=True)) * params["params"]["scale"]
    np.testing.assert_allclose(each.apply(params, X), wanted, rtol=1e-4, atol=1e-5)


def test_computes_in_float32_and_starts_as_the_plain_norm():
    low = X.astype(jnp.bfloat16)
    for kind in ("rms", "rms_offset", "layer", "layer_offset"):
        module = norm(kind, 1e-5, "norm")
        params = jax.tree.map(
            lambda leaf: leaf.astype(jnp.bfloat16), meta.unbox(module.init(jax.random.key(0), X))
        )
        y = module.apply(params, low)
        assert y.dtype == jnp.bfloat16
        x = np.asarray(low, np.float64)
        x = x - x.mean(-1, keepdims=True) if kind.startswith("layer") else x
        np.testing.assert_allclose(
            np.float64(y), x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5), rtol=1e-2, atol=1e-2
        )


@pytest.mark.parametrize("reduced", [1, 2])
def test_the_slope_of_a_layer_norm_in_both_modes_of_differentiation(reduced):
    def plain(x):
        axes = tuple(range(-reduced, 0))
        centred = x - jnp.mean(x, axes, keepdims=True)
        return centred / jnp.sqrt(jnp.mean(centred**2, axes, keepdims=True) + 1e-3)

    def ours(x):
        return standardised(x, reduced, 1e-3)

    t = jax.random.normal(jax.random.key(1), X.shape)
    for slope in (lambda f: jax.jvp(f, (X,), (t,))[1], lambda f: jax.vjp(f, X)[1](t)[0]):
        np.testing.assert_allclose(slope(ours), slope(plain), rtol=1e-4, atol=1e-5)


def test_the_backward_pass_of_a_layer_norm_keeps_one_array_and_a_number_a_vector():
    kept = jax.eval_shape(lambda x: jax.vjp(lambda x: standardised(x, 1, 1e-5), x)[1], X)
    assert sum(leaf.size for leaf in jax.tree.leaves(kept)) <= X.size + X.size // X.shape[-1]
