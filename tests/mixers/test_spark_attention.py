import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.errors import UsageError
from effjax.mixers import Attention, SparkAttention, spark_attention
from effjax.mixers.context import Context
from effjax.mixers.dot_product import weighted_sum

N, WIDTH = 24, 16
X = jax.random.normal(jax.random.key(0), (2, N, WIDTH))
FIELDS = dict(heads=4, kv_heads=2, predictor=4, active=5, head_dim=8)


@functools.cache
def params():
    shapes = meta.unbox(jax.eval_shape(SparkAttention(**FIELDS).init, jax.random.key(1), X, Context()))
    draw = np.random.default_rng(2)
    return jax.tree.map(lambda leaf: np.float32(0.4 * draw.normal(size=leaf.shape)), shapes)


def apply(x=X, context=None, **fields):
    return jax.jit(SparkAttention(**{**FIELDS, **fields}).apply)(params(), x, context or Context())


def by_hand(x, active, window=N):
    """Query by query, in double precision, without rotary positions."""
    from statistics import NormalDist

    w = {name: np.asarray(p["kernel"], np.float64) for name, p in params()["params"].items()}
    x = np.asarray(x, np.float64)
    q, k, v = (np.einsum("nc,chd->nhd", x, w[name]) for name in ("query", "key", "value"))
    y, kept = np.zeros_like(q), []
    for n in range(len(x)):
        seen = np.arange(max(0, n - window + 1), n + 1)
        for h in range(4):
            keys, values = k[seen, h // 2], v[seen, h // 2]
            scores = keys[:, :4] @ q[n, h, :4] / 2.0
            chosen = np.ones(len(seen), bool)
            if len(seen) > active:
                chosen = scores >= scores.mean() + scores.std() * NormalDist().inv_cdf(1 - active / len(seen))
                chosen |= scores == scores.max()
            weights = np.where(chosen, np.exp(scores - scores.max()), 0)
            gain = np.log1p(np.exp(keys[:, 4:] @ q[n, h, 4:] / 2.0))
            y[n, h] = (weights / weights.sum() * gain) @ values
            kept.append(chosen.sum())
    return np.einsum("nhd,hdc->nc", y, w["output"]), np.asarray(kept)


@pytest.mark.parametrize(("active", "window"), [(5, None), (5, 12), (N, None)])
def test_is_its_equation(active, window):
    y = apply(active=active, window=window)
    for row in range(2):
        expected, kept = by_hand(X[row], active, window or N)
        np.testing.assert_allclose(y[row], expected, rtol=1e-3, atol=1e-4)
    if active < N:
        late = kept.reshape(N, 4)[12:]
        assert late.mean() == pytest.approx(active, abs=1.5)
        assert late.max() < 2.5 * active


def test_layers_window_replaces_its_own():
    np.testing.assert_array_equal(apply(context=Context(window=jnp.int32(12))), apply(window=12))


def test_parameters_and_cache_are_those_of_attention():
    dense = Attention(4, 2, head_dim=8, qkv_bias=False, out_bias=False)
    made = jax.eval_shape(dense.init, jax.random.key(1), X, Context())
    assert jax.tree.map(jnp.shape, meta.unbox(made)) == jax.tree.map(jnp.shape, params())
    shapes = lambda mixer: jax.tree.map(jnp.shape, mixer.init_cache(2, 7, WIDTH))
    assert shapes(SparkAttention(**FIELDS)) == shapes(dense)


def test_distances_alone_count_with_rotary_positions():
    near, far = (Context(positions=jnp.broadcast_to(jnp.arange(N) + start, (2, N))) for start in (0, 50))
    turned = apply(context=near, rotary_base=100.0)
    np.testing.assert_allclose(apply(context=far, rotary_base=100.0), turned, rtol=1e-3, atol=1e-3)
    assert np.abs(turned - apply()).max() > 0.1


@pytest.mark.parametrize("window", [None, 9])
def test_cached_decoding_equals_the_whole(window):
    mixer = SparkAttention(**FIELDS, rotary_base=100.0, window=window)
    whole = apply(rotary_base=100.0, window=window)
    step = jax.jit(functools.partial(mixer.apply, method="step"))
    cache, found = mixer.init_cache(2, N + 3, WIDTH), []
    for cut in (slice(0, 10), *(slice(i, i + 1) for i in range(10, N))):
        y, cache = step(params(), X[:, cut], cache, Context())
        found.append(y)
    np.testing.assert_allclose(jnp.concatenate(found, 1), whole, rtol=1e-4, atol=1e-4)


def test_gathered_keys_give_what_all_give(monkeypatch, draw):
    monkeypatch.setattr(spark_attention, "BLOCK", 2)  # and several times as many are chosen
    b, s, active = 2, 40, 5
    mixer = SparkAttention(**{**FIELDS, "active": active})
    q, k, v = (jnp.float32(draw.normal(size=(b, *size, 8))) for size in ((1, 4), (s, 2), (s, 2)))
    allowed = jnp.asarray(draw.uniform(size=(b, 1, 1, s)) < 0.8).at[1, :, :, 3:].set(False)
    bias = jnp.float32(draw.normal(size=(b, 4, 1, s)))
    whole = jax.jit(lambda *a: weighted_sum(mixer.weights(q, k, *a), v))(allowed, bias)
    # A weight of 0 does not hide a number that is none: what is neither chosen nor the last slot is not read.
    _, chosen = jax.jit(mixer.predicted)(q, k, allowed, bias)
    assert np.sum(chosen, axis=3).max() > 2
    read = jnp.any(chosen.reshape(b, 2, 2, s), axis=2).swapaxes(1, 2)[..., None]  # [B, S, G, 1]
    read = read.at[:, -1].set(True)
    k, v = k.at[..., 4:].set(jnp.where(read, k[..., 4:], jnp.nan)), jnp.where(read, v, jnp.nan)
    found = jax.jit(lambda *a: mixer.take(q, k, v, *a))(allowed, bias)
    np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("queries", "slots"), [(2, 100), (1, 10)])
def test_many_queries_and_few_slots_read_all(queries, slots, draw):
    sizes = (queries, 4), (slots, 2), (slots, 2)
    q, k, v = (jnp.float32(draw.normal(size=(1, *size, 8))) for size in sizes)
    allowed = jnp.ones((1, 1, queries, slots), bool)
    program = jax.make_jaxpr(lambda: SparkAttention(**FIELDS).take(q, k, v, allowed, None))()
    assert "while" not in str(program)


def test_packed_documents_do_not_see_each_other():
    segments = jnp.asarray([[1] * 10 + [2] * 14] * 2)
    positions = jnp.asarray([[*range(10), *range(14)]] * 2)
    packed = apply(context=Context(positions=positions, segments=segments), rotary_base=100.0)
    np.testing.assert_allclose(packed[:, :10], apply(X[:, :10], rotary_base=100.0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(packed[:, 10:], apply(X[:, 10:], rotary_base=100.0), rtol=1e-4, atol=1e-4)


def test_gradients_are_right():
    way = jax.tree.map(
        lambda leaf: np.cos(np.arange(leaf.size, dtype=np.float32)).reshape(leaf.shape), params()
    )
    mixer = SparkAttention(**FIELDS)
    loss = jax.jit(
        lambda s: jnp.sum(
            jnp.sin(mixer.apply(jax.tree.map(lambda p, w: p + s * w, params(), way), X[:1, :6], Context()))
        )
    )
    step = 2e-4
    assert (loss(step) - loss(-step)) / (2 * step) == pytest.approx(float(jax.grad(loss)(0.0)), rel=2e-2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(predictor=8), "predictor=8 of 8 channels"),
        (dict(predictor=3, rotary_base=1e4), "cut no pair"),
        (dict(kv_heads=3), "multiple of kv_heads=3"),
    ],
)
def test_a_wrong_definition_is_one_clear_message(fields, message):
    with pytest.raises(UsageError, match=message):
        SparkAttention(**{**FIELDS, **fields}).init(jax.random.key(0), X, Context())
