"""Fréchet distance, precision and recall against float64 NumPy and against what they must be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.errors import UsageError
from effjax.measure.fidelity import Moments, frechet_distance, precision_and_recall


def features(count, channels=6, scale=1.0, shift=0.0):
    mixing = np.random.default_rng(1).normal(size=(channels, channels))
    return (shift + scale * np.random.default_rng(count).normal(size=(count, channels)) @ mixing).astype(
        np.float32
    )


def numpy_distance(a, b):
    """The formula with a general matrix root, by eigenvalues of the product, in float64."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    first, second = np.cov(a.T), np.cov(b.T)
    overlap = np.sqrt(np.linalg.eigvals(first @ second).real.clip(0)).sum()
    apart = np.sum((a.mean(0) - b.mean(0)) ** 2)
    return apart + np.trace(first) + np.trace(second) - 2 * overlap


def distance(a, b):
    return float(jax.jit(frechet_distance)(Moments.of(jnp.asarray(a)), Moments.of(jnp.asarray(b))))


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.5), (2.0, 0.0), (0.3, 30.0)])
@pytest.mark.parametrize("channels", [2, 40])
def test_the_distance_is_that_of_float64(scale, shift, channels):
    a, b = features(300, channels), features(200, channels, scale, shift)
    spread = np.trace(np.cov(a.T)) + np.trace(np.cov(b.T))  # what the two terms of the formula take away
    assert distance(a, b) == pytest.approx(numpy_distance(a, b), rel=1e-5, abs=1e-6 * spread)


def test_fewer_features_than_channels():
    """Singular covariances, as of a thousand pictures in 2048 channels."""
    a, b = features(12, 40), features(20, 40, 1.5, 0.2)
    assert distance(a, b) == pytest.approx(numpy_distance(a, b), rel=1e-5)


def test_shifted_and_scaled_normals_have_the_closed_form():
    a = features(5000, 3)
    assert distance(a, a) == pytest.approx(0.0, abs=1e-3)
    assert distance(a, a + 2.0) == pytest.approx(3 * 4.0, rel=1e-4)
    assert distance(a, 3.0 * a - 3.0 * a.mean(0) + a.mean(0)) == pytest.approx(
        4 * np.trace(np.cov(a.T)), rel=1e-3
    )


def test_batches_add_up():
    a = features(100) + 1000.0  # a mean far from zero, where sums of squares would lose their digits
    whole = Moments.of(jnp.asarray(a))
    parts = Moments.of(jnp.asarray(a[:30]))
    for start, stop in ((30, 31), (31, 100)):
        parts = parts.merged(Moments.of(jnp.asarray(a[start:stop])))
    assert float(parts.count) == 100
    np.testing.assert_allclose(parts.mean, whole.mean, rtol=1e-6)
    np.testing.assert_allclose(parts.covariance(), np.cov(a.T.astype(np.float64)), rtol=2e-3, atol=2e-3)


def test_masked_rows_do_not_count():
    a = features(20)
    padded = np.concatenate([a, 1e3 * np.ones((4, 6), np.float32)])
    got = Moments.of(jnp.asarray(padded), jnp.asarray([1.0] * 20 + [0.0] * 4))
    np.testing.assert_allclose(got.covariance(), Moments.of(jnp.asarray(a)).covariance(), rtol=1e-4)


def numpy_precision(drawn, real, k):
    """By the definition, pair by pair."""
    inside = 0
    for x in drawn:
        for centre in real:
            radius = np.sort(np.linalg.norm(real - centre, axis=1))[k]  # the nearest is itself
            if np.linalg.norm(x - centre) <= radius:
                inside += 1
                break
    return inside / len(drawn)


def test_precision_and_recall_are_those_of_the_definition():
    drawn, real = features(40, 3, 0.7), features(60, 3)
    precision, recall = precision_and_recall(jnp.asarray(drawn), jnp.asarray(real))
    assert float(precision) == pytest.approx(numpy_precision(drawn, real, 3))
    assert float(recall) == pytest.approx(numpy_precision(real, drawn, 3))
    assert float(precision) > float(recall)  # narrower than the real ones: good, but not varied


def test_equal_sets_are_perfect_and_distant_ones_worthless():
    a = jnp.asarray(features(30))
    assert [float(v) for v in precision_and_recall(a, a)] == [1.0, 1.0]
    assert [float(v) for v in precision_and_recall(a, a + 1e4)] == [0.0, 0.0]


def test_refusals():
    with pytest.raises(UsageError, match="features of 3 and of 4 channels"):
        frechet_distance(Moments.of(jnp.ones((5, 3))), Moments.of(jnp.ones((5, 4))))
    with pytest.raises(UsageError, match="neighbours=3 needs more features"):
        precision_and_recall(jnp.ones((3, 2)), jnp.ones((9, 2)))
