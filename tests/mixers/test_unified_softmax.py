import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.errors import UsageError
from effjax.mixers import unified_softmax
from effjax.mixers.dot_product import softmax_attention
from effjax.mixers.unified_softmax import (
    Range,
    UnifiedSoftmax,
    calibrated,
    outside,
    scores,
    synchronised_attention,
    unified_attention,
)

WIDE = Range(0.0, -30.0, 30.0)
unified = jax.jit(unified_attention, static_argnames=("within", "scale", "cap", "splits"))
synchronised = jax.jit(synchronised_attention, static_argnames=("scale", "cap", "splits"))


def drawn(draw, n=1, s=48, factor=1.0):
    shapes = ((2, n, 4, 8), (2, s, 2, 8), (2, s, 2, 6))
    q, k, v = (jnp.asarray(draw.normal(size=shape), jnp.float32) for shape in shapes)
    return q * factor, k, v


def exact(q, k, v, mask=None):
    q, k, v = (np.asarray(x, float) for x in (q, k, v))
    k, v = np.repeat(k, 2, 2), np.repeat(v, 2, 2)
    x = np.einsum("bnhd,bshd->bhns", q, k) * q.shape[-1] ** -0.5
    x = x if mask is None else np.where(mask, x, -np.inf)
    weights = np.exp(x - x.max(-1, keepdims=True))
    return np.einsum("bhns,bshd->bnhd", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("phi", [-20.0, -3.5, 0.0, 11.0, 25.0])
def test_any_constant_gives_softmax(draw, phi):
    q, k, v = drawn(draw)
    y = unified(q, k, v, Range(phi, -50.0, 50.0))
    np.testing.assert_allclose(y, exact(q, k, v), atol=2e-6)


def test_it_is_what_jax_computes(draw):
    q, k, _ = drawn(draw, n=3)
    v = jnp.asarray(draw.normal(size=k.shape), jnp.float32)
    np.testing.assert_allclose(unified(q, k, v, WIDE), jax.nn.dot_product_attention(q, k, v), atol=2e-6)


@pytest.mark.parametrize("splits", [1, 2, 3, 5, 16, 48, 50])
def test_the_number_of_parts_means_nothing(draw, splits):
    q, k, v = drawn(draw)
    for way in (functools.partial(unified, within=WIDE), synchronised):
        np.testing.assert_allclose(way(q, k, v, splits=splits), way(q, k, v, splits=8), atol=2e-6)


@pytest.mark.parametrize("factor", [1.0, 100.0, -100.0])
def test_scores_of_any_size_are_finite_and_right(draw, factor):
    """Of +-100 and more the exponential is infinite or 0: all is computed again."""
    q, k, v = drawn(draw, factor=factor)
    assert bool(jnp.any(outside(scores(q, k), None, WIDE))) == (abs(factor) > 1)
    np.testing.assert_allclose(unified(q, k, v, WIDE), exact(q, k, v), atol=3e-5)


def marked(q, parts, scale, cap):
    return jnp.full((q.shape[0], q.shape[2], q.shape[1], parts[1].shape[-1]), 7.0)


@pytest.mark.parametrize(("score", "again"), [(-5.01, True), (-4.99, False), (2.99, False), (3.01, True)])
def test_one_score_outside_recomputes_and_none_does_not(monkeypatch, draw, score, again):
    """The score of one pair is set; what recomputes is replaced to tell that it ran."""
    monkeypatch.setattr(unified_softmax, "_with_maximum", marked)
    q, k = jnp.zeros((1, 1, 1, 4)).at[..., 0].set(2.0), jnp.zeros((1, 8, 1, 4)).at[0, :, 0, 0].set(1.0)
    k = k.at[0, 5, 0, 0].set(1.0 + score)  # scores are 1 and 1 + this
    v = jnp.asarray(draw.normal(size=(1, 8, 1, 4)), jnp.float32)
    run = jax.jit(lambda *x: unified_attention(*x, Range(1.0, -5.0, 3.0), splits=4))
    assert bool(jnp.all(run(q, k, v) == 7.0)) == again
    # A pair that is masked does not count.
    mask = (jnp.arange(8) != 5)[None, None, None]
    run = jax.jit(lambda *x: unified_attention(*x, Range(1.0, -5.0, 3.0), mask=mask, splits=4))
    np.testing.assert_allclose(run(q, k, v), exact_one(v, np.arange(8) != 5), atol=1e-6)


def exact_one(v, kept):
    return np.asarray(v)[:, kept].mean(1, keepdims=True)


def test_masked_parts_count_nothing(draw):
    """Whole parts that a query does not see, in both ways."""
    q, k, v = drawn(draw, n=2)
    seen = (np.arange(48) >= 20) & (np.arange(48) < 41) & (np.arange(48) != 30)
    mask = jnp.broadcast_to(jnp.asarray(seen), (2, 1, 2, 48))
    for way in (functools.partial(unified, within=WIDE), synchronised):
        np.testing.assert_allclose(way(q, k, v, mask=mask), exact(q, k, v, mask), atol=2e-6)


def test_a_query_that_sees_no_key_takes_nothing(draw):
    """As the rows of a batch that nobody has; also where the others are computed again."""
    for factor in (1.0, 100.0):
        q, k, v = drawn(draw, n=2, factor=factor)
        mask = jnp.ones((2, 1, 2, 48), bool).at[1, 0, 1].set(False)
        y = unified(q, k, v, WIDE, mask=mask)
        np.testing.assert_array_equal(y[1, 1], 0.0)
        np.testing.assert_allclose(y[0], exact(q, k, v)[0], atol=3e-5)


def test_capped_and_biased_scores(draw):
    q, k, v = drawn(draw, factor=9.0)
    bias = jnp.asarray(draw.normal(size=(2, 4, 1, 48)), jnp.float32)
    mask = jnp.asarray(draw.random((2, 1, 1, 48)) < 0.7)
    options = dict(mask=mask, bias=bias, cap=3.0)
    expected = jax.jit(lambda *x: softmax_attention(*x, causal=False, **options))(q, k, v)
    for way in (unified, lambda *x, **more: synchronised(*x[:3], **more)):
        np.testing.assert_allclose(way(q, k, v, WIDE, **options), expected, atol=2e-6)


def test_low_precision_sums_in_float32(draw):
    q, k, v = (x.astype(jnp.bfloat16) for x in drawn(draw, s=1024))
    y = unified(q, k, v, WIDE)
    assert y.dtype == jnp.bfloat16
    expected = exact(*(np.asarray(x, np.float32) for x in (q, k, v)))
    np.testing.assert_allclose(np.asarray(y, float), expected, atol=2e-3)


def test_a_range_is_read_off_scores(draw):
    batches = [jnp.asarray(draw.normal(3.0, 2.0, (50, 100)), jnp.float32) for _ in range(4)]
    masked = [batch.at[:, ::7].set(-jnp.inf) for batch in batches]
    for share in (0.9, 0.999, 1.0):
        found = calibrated(masked, share, margin=0.0)
        held = np.concatenate([np.asarray(batch).ravel() for batch in masked])
        held = held[held > -np.inf] - found.phi
        np.testing.assert_allclose(((held >= found.low) & (held <= found.high)).mean(), share, atol=1e-3)
        np.testing.assert_allclose(-found.low, found.high)
    wider = calibrated(masked, 0.9, margin=1.5)
    assert wider.high == pytest.approx(calibrated(masked, 0.9, margin=0.0).high + 1.5)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Range(low=3.0, high=2.0), "between low=3.0 and high=2.0"),
        (lambda: Range(low=-90.0), "exponentials are sure between -60 and 60"),
        (lambda: calibrated([]), "there are 0 scores"),
        (lambda: calibrated([jnp.asarray([-100.0, 100.0])]), "lie too far apart"),
        (
            lambda: unified_attention(jnp.ones((1, 1, 1, 2)), *[jnp.ones((1, 9, 1, 2))] * 2, WIDE, splits=0),
            "splits=0 parts of the keys",
        ),
        (lambda: UnifiedSoftmax(splits=0), "splits=0 parts of the keys"),
    ],
)
def test_bad_input(make, said):
    with pytest.raises(UsageError, match=said):
        make()
