"""Attention's two products and its softmax, against JAX's own and against loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.mixers.dot_product import dot_products, softmax, softmax_attention, weighted_sum


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_products_by_head_are_the_loops(groups):
    q, k = drawn(2, 5, 4, 3), drawn(2, 6, groups, 3, seed=1)
    p, v = drawn(2, 4, 5, 6, seed=2), drawn(2, 6, groups, 7, seed=3)
    logits, y = np.zeros((2, 4, 5, 6)), np.zeros((2, 5, 4, 7))
    for b, h, n, s in np.ndindex(logits.shape):
        group = h // (4 // groups)
        logits[b, h, n, s] = np.float64(q[b, n, h]) @ k[b, s, group]
        y[b, n, h] += np.float64(p[b, h, n, s]) * v[b, s, group]
    np.testing.assert_allclose(dot_products(q, k), logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(weighted_sum(p, v), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("request_", ["plain", "causal", "mask", "window", "bias", "scale"])
@pytest.mark.parametrize("groups", [2, 4])
def test_it_is_the_attention_of_jax(request_, groups):
    q, k, v = drawn(2, 6, 4, 8), drawn(2, 6, groups, 8, seed=1), drawn(2, 6, groups, 8, seed=2)
    mask = np.random.default_rng(3).random((2, 1, 6, 6)) < 0.6
    mask[0, 0, 1] = False  # a query that sees nothing gets the mean, not NaN
    options = {
        "plain": {},
        "causal": dict(is_causal=True),
        "mask": dict(mask=jnp.asarray(mask)),
        "window": dict(local_window_size=(2, 1)),
        "bias": dict(bias=drawn(2, 1, 6, 6, seed=4)),
        "scale": dict(scale=0.3),
    }[request_]
    own = dict(options, mask=options.get("mask"), causal=options.get("is_causal", False))
    own["window"] = own.pop("local_window_size", None)
    own.pop("is_causal", None)
    ours = functools.partial(softmax_attention, **own)
    theirs = functools.partial(jax.nn.dot_product_attention, **options)
    (y, pull), (wanted, their_pull) = jax.vjp(ours, q, k, v), jax.vjp(theirs, q, k, v)
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
    g = drawn(*y.shape, seed=5)
    for gradient, other in zip(pull(g), their_pull(g), strict=True):
        np.testing.assert_allclose(gradient, other, rtol=1e-4, atol=1e-5)


def test_bfloat16_has_float32_logits():
    q, k = (jnp.asarray(drawn(1, 4, 2, 64, seed=seed), jnp.bfloat16) for seed in (0, 1))
    logits = dot_products(q, k)
    assert logits.dtype == jnp.float32
    exact = np.einsum("bnhd,bshd->bhns", np.float64(q), np.float64(k))
    np.testing.assert_allclose(logits, exact, rtol=1e-5, atol=1e-4)
    assert softmax_attention(q, k, k, mask=None, causal=False).dtype == jnp.bfloat16


def test_softmax_is_that_of_jax_in_both_modes_of_differentiation():
    x, t = drawn(3, 5) * 10, drawn(3, 5, seed=1)
    np.testing.assert_allclose(softmax(x), jax.nn.softmax(x), rtol=1e-6)
    moved, wanted = jax.jvp(softmax, (x,), (t,))[1], jax.jvp(jax.nn.softmax, (x,), (t,))[1]
    np.testing.assert_allclose(moved, wanted, rtol=1e-4, atol=1e-7)
    pulled, wanted = jax.vjp(softmax, x)[1](t)[0], jax.vjp(jax.nn.softmax, x)[1](t)[0]
    np.testing.assert_allclose(pulled, wanted, rtol=1e-4, atol=1e-7)


def test_the_backward_pass_of_softmax_keeps_one_array():
    """What it keeps would be as large again with the exponentials."""
    x = jax.ShapeDtypeStruct((8, 32), jnp.float32)
    kept = jax.eval_shape(lambda x: jax.vjp(softmax, x)[1], x)
    assert sum(leaf.size for leaf in jax.tree.leaves(kept)) == 8 * 32
