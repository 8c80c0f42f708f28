import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.decoding.cache import init_cache
from effjax.errors import UsageError
from effjax.mixers import Attention
from effjax.mixers.context import Context
from effjax.mixers.rotary import plain_frequencies, rotate


def made(x, **fields):
    """An attention with parameters that are random throughout, biases and scales too."""
    attention = Attention(**fields)
    shapes = meta.unbox(jax.eval_shape(attention.init, jax.random.key(0), x, Context()))
    draw = np.random.default_rng(1)
    return attention, jax.tree.map(lambda leaf: np.float32(draw.normal(size=leaf.shape) * 0.3), shapes)


def run(attention, params, x, context=None):
    return jax.jit(attention.apply)(params, x, Context() if context is None else context)


def by_hand(params, x, heads, kv_heads, allowed):
    """Softmax attention written as loops over sequences, heads and queries, without rotation."""
    p = jax.tree.map(np.asarray, params["params"])
    x = np.asarray(x)
    q, k, v = (
        np.einsum("bnc,chd->bnhd", x, p[n]["kernel"]) + p[n]["bias"] for n in ("query", "key", "value")
    )
    mixed = np.zeros_like(q)
    for b, n, h in np.ndindex(*q.shape[:3]):
        g = h // (heads // kv_heads)
        logits = k[b, :, g] @ q[b, n, h] / np.sqrt(q.shape[-1])
        weights = np.where(allowed[b, n], np.exp(logits - logits.max()), 0.0)
        mixed[b, n, h] = weights @ v[b, :, g] / weights.sum()
    return np.einsum("bnhd,hdc->bnc", mixed, p["output"]["kernel"]) + p["output"]["bias"]


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(2), (2, 6, 16))


@pytest.mark.parametrize(("kv_heads", "causal"), [(1, True), (2, False), (4, True)])
def test_equals_the_equation(x, kv_heads, causal):
    attention, params = made(x, heads=4, kv_heads=kv_heads, causal=causal)
    allowed = np.tril(np.ones((6, 6), bool)) if causal else np.ones((6, 6), bool)
    wanted = by_hand(params, x, 4, kv_heads, np.stack([allowed, allowed]))
    np.testing.assert_allclose(run(attention, params, x), wanted, rtol=1e-4, atol=1e-5)


def test_segments_and_validity_hide_keys(x):
    attention, params = made(x, heads=2, causal=True)
    segments = jnp.array([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 2, 2]])
    valid = jnp.array([[True] * 6, [True, False, True, True, True, True]])
    same = np.asarray(segments)[:, :, None] == np.asarray(segments)[:, None, :]
    allowed = same & np.asarray(valid)[:, None, :] & np.tril(np.ones((6, 6), bool))[None]
    y = run(attention, params, x, Context(segments=segments, valid=valid))
    np.testing.assert_allclose(y, by_hand(params, x, 2, 2, allowed), rtol=1e-4, atol=1e-5)


def test_rotation_by_hand():
    # Two pairs of channels; base 100 gives frequencies 1 and 1/10.
    x = jnp.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    turned = rotate(x, jnp.array([[5]]), jnp.float32(plain_frequencies(100.0, 4)))[0, 0, 0]
    pairs = np.array([1 + 3j, 2 + 4j]) * np.exp(1j * 5 * np.array([1.0, 0.1]))
    np.testing.assert_allclose(turned, [*pairs.real, *pairs.imag], rtol=1e-5)


def test_rotation_is_relative(x):
    attention, params = made(x, heads=2, rotary_base=100.0)
    places = jnp.broadcast_to(jnp.arange(6)[None], (2, 6))
    here = run(attention, params, x, Context(positions=places))
    np.testing.assert_allclose(run(attention, params, x), here, atol=1e-6)
    shifted = run(attention, params, x, Context(positions=places + 37))
    np.testing.assert_allclose(shifted, here, rtol=1e-4, atol=1e-5)
    stretched = run(attention, params, x, Context(positions=places * 2))
    assert np.abs(stretched - here).max() > 1e-3


@pytest.mark.parametrize(
    "fields", [dict(heads=4), dict(heads=4, kv_heads=2, qk_norm=True, rotary_base=50.0), dict(heads=4, top=2)]
)
@pytest.mark.parametrize("sizes", [(1,) * 6, (4, 1, 1)])
def test_steps_equal_the_whole(x, fields, sizes):
    attention, params = made(x, causal=True, **fields)
    cache = attention.init_cache(2, 8, 16)
    step = jax.jit(functools.partial(attention.apply, method="step"))
    pieces = []
    for piece in jnp.split(x, np.cumsum(sizes)[:-1], axis=1):
        y, cache = step(params, piece, cache, Context())
        pieces.append(y)
    assert int(cache.written) == 6
    whole = run(attention, params, x)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), whole, rtol=1e-5, atol=1e-5)


def test_the_cache_keeps_its_own_dtype(x):
    attention, params = made(x, heads=2, causal=True)
    cache = attention.init_cache(2, 6, 16, jnp.bfloat16)
    y, cache = attention.apply(params, x, cache, Context(), method="step")
    assert cache.keys.dtype == cache.values.dtype == jnp.bfloat16
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, run(attention, params, x), atol=0.05)


def test_bad_requests_are_named(x):
    def start(**fields):
        Attention(**fields).init(jax.random.key(0), x, Context())

    with pytest.raises(UsageError, match="kv_heads=3 does not divide heads=4"):
        start(heads=4, kv_heads=3)
    with pytest.raises(UsageError, match="top=0: a query sums over at least one key"):
        start(heads=4, top=0)
    with pytest.raises(UsageError, match="heads=3 does not divide the width 16"):
        start(heads=3)
    with pytest.raises(UsageError, match="a head of 1 has no 1 in pairs"):
        start(heads=16, rotary_base=10.0)
    attention, params = made(x, heads=2)
    with pytest.raises(UsageError, match="by position alone"):
        attention.apply(
            params, x, init_cache(2, 6, 2, 8), Context(valid=jnp.ones((2, 6), bool)), method="step"
        )
    with pytest.raises(UsageError, match="6 tokens do not fit a cache of 5 slots"):
        attention.apply(params, x, init_cache(2, 5, 2, 8), Context(), method="step")
