"""Attention's two products and its softmax, against JAX's own and against loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.measure import count
from effjax.mixers.dot_product import (
    LOGITS_AT_ONCE,
    dot_products,
    softmax,
    softmax_attention,
    weighted_sum,
)


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


BLOCKED = {
    "plain": {},
    "causal": dict(causal=True),
    "window": dict(causal=True, window=(2, 0)),
    "keys alone": dict(mask=jnp.arange(11)[None, None, None] < jnp.array([11, 7])[:, None, None, None]),
    "mask and bias": dict(
        mask=jnp.asarray(np.random.default_rng(3).random((2, 1, 11, 11)) < 0.6),
        bias=drawn(1, 4, 11, 11, seed=4),
        scale=0.3,
        cap=2.0,
    ),
}


@pytest.mark.parametrize("options", BLOCKED)
@pytest.mark.parametrize("block", [1, 4, 10])
def test_queries_in_blocks_give_the_same_numbers_and_gradients(options, block):
    q, k, v = drawn(2, 11, 4, 8), drawn(2, 11, 2, 8, seed=1), drawn(2, 11, 2, 5, seed=2)
    g = drawn(2, 11, 4, 5, seed=5)
    options = dict(mask=None, causal=False) | BLOCKED[options]

    def both_ways(block):
        y, pull = jax.vjp(functools.partial(softmax_attention, block=block, **options), q, k, v)
        return y, *pull(g)

    for ours, wanted in zip(jax.jit(both_ways, static_argnums=0)(block), both_ways(None), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-6)


def test_the_bias_has_its_gradient_in_blocks_too():
    q, k = drawn(1, 6, 2, 4), drawn(1, 6, 2, 4, seed=1)

    def loss(bias, block):
        y = softmax_attention(q, k, k, mask=None, causal=True, bias=bias, block=block)
        return jnp.sum(y**2)

    bias, gradient = drawn(1, 1, 1, 6, seed=2), jax.jit(jax.grad(loss), static_argnums=1)
    np.testing.assert_allclose(gradient(bias, 4), gradient(bias, 6), rtol=1e-5, atol=1e-6)


def test_long_sequences_come_in_blocks_and_memory_grows_with_the_keys_alone():
    def peaks(length, **options):
        q, k = (jax.ShapeDtypeStruct((1, length, heads, 8), jnp.float32) for heads in (4, 2))
        attend = functools.partial(softmax_attention, mask=None, causal=True, **options)
        forward = count(attend, q, k, k)
        backward = count(jax.grad(lambda *given: jnp.sum(attend(*given) ** 2), (0, 1, 2)), q, k, k)
        assert forward.macs == 2 * 4 * 8 * length**2
        return forward.peak_bytes, backward.peak_bytes

    length = 16_384
    assert length**2 > LOGITS_AT_ONCE
    logits = 4 * 4 * length**2
    assert min(peaks(length, block=length)) > logits
    assert max(peaks(length)) < logits / 8
    assert peaks(512) == peaks(512, block=512)  # what is short is as it was


def test_a_share_is_of_the_whole_head():
    q, k = drawn(1, 6, 2, 4), drawn(1, 6, 2, 4, seed=1)
    attend = jax.jit(
        functools.partial(softmax_attention, mask=None, causal=True, share=0.3), static_argnames="block"
    )
    np.testing.assert_array_equal(attend(q, k, k, block=2), attend(q, k, k))


def test_the_top_keys_of_a_query_alone_have_weight():
    q, k, v = drawn(2, 5, 4, 8), drawn(2, 6, 2, 8, seed=1), drawn(2, 6, 2, 3, seed=2)
    told = dict(mask=None, causal=False)
    soft = softmax_attention(q, k, v, **told)
    np.testing.assert_array_equal(softmax_attention(q, k, v, top=6, **told), soft)
    logits = np.asarray(dot_products(q, k), np.float64) / np.sqrt(8)  # [B, H, N, S]
    seen = np.repeat(np.asarray(v), 2, axis=2)  # [B, S, H, E]
    one = softmax_attention(q, k, v, top=1, **told)
    for b, h, n in np.ndindex(2, 4, 5):
        np.testing.assert_array_equal(one[b, n, h], seen[b, logits[b, h, n].argmax(), h])
    order = np.argsort(-logits, axis=-1)[..., :3]
    p = np.zeros_like(logits)
    np.put_along_axis(p, order, np.exp(np.take_along_axis(logits, order, -1)), -1)
    expected = np.einsum("bhns,bshe->bnhe", p / p.sum(-1, keepdims=True), seen)
    for block in (None, 2):
        found = softmax_attention(q, k, v, top=3, block=block, **told)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    # Of the keys that it may see, where these are fewer.
    causal = softmax_attention(q, k, v, mask=None, causal=True, top=3)
    np.testing.assert_allclose(
        causal[:, :3], softmax_attention(q, k, v, mask=None, causal=True)[:, :3], rtol=1e-5
    )
