import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.errors import UsageError
from effjax.layers.statistical_topk import among, soft_top_k, threshold

X = jax.random.normal(jax.random.key(0), (3, 40))


@pytest.mark.parametrize("k", [20, 328, 2048, 3900])
def test_normal_entries_pass_as_often_as_a_binomial_says(k):
    d, rows = 4096, 64
    x = 3.0 + 0.2 * jax.random.normal(jax.random.key(1), (rows, d))
    count = np.sum(np.asarray(soft_top_k(x, k)) > 0, axis=1)
    spread = np.sqrt(k * (1 - k / d))
    # The threshold is made from the same entries, so that counts spread less than independent draws.
    assert abs(count.mean() - k) < 4 * spread / np.sqrt(rows)
    assert np.all(np.abs(count - k) < 5 * spread)
    assert count.std() > 0.1 * spread


def test_is_its_equation():
    x = np.asarray(X, np.float64)
    theta = x.mean(1) + x.std(1) * 1.2815515655446004  # 0.9 of a normal distribution lie below
    np.testing.assert_allclose(threshold(X, 4)[:, 0], theta, rtol=1e-5)
    np.testing.assert_allclose(soft_top_k(X, 4), np.maximum(x - theta[:, None], 0), atol=1e-5)


def test_scaling_and_shifting_move_the_threshold_along():
    np.testing.assert_allclose(threshold(2.5 * X - 7.0, 6), 2.5 * threshold(X, 6) - 7.0, rtol=1e-4)
    np.testing.assert_allclose(soft_top_k(2.5 * X - 7.0, 6), 2.5 * soft_top_k(X, 6), atol=1e-4)


def test_gradient_is_one_on_active_entries_less_what_moves_the_threshold():
    k, quantile = 6, 1.0364333894937898  # of 0.85
    x = np.asarray(X[0], np.float64)
    active = np.asarray(soft_top_k(X[0], k)) > 0
    # d theta / d x_i = 1/d + Q (x_i - mean) / (d std)
    slope = (1 + quantile * (x - x.mean()) / x.std()) / x.size
    gradient = jax.grad(lambda x: jnp.sum(soft_top_k(x, k)))(X[0])
    np.testing.assert_allclose(gradient, active - active.sum() * slope, atol=1e-5)
    way, step = np.cos(np.arange(x.size)), 1e-3
    moved = [float(jnp.sum(soft_top_k(X[0] + s * step * way, k))) for s in (1, -1)]
    assert (moved[0] - moved[1]) / (2 * step) == pytest.approx(float(gradient @ way), rel=1e-2)


def test_all_entries_need_no_threshold():
    np.testing.assert_array_equal(soft_top_k(X, 40), X)
    for k in (0, 40, 41):
        with pytest.raises(UsageError, match=f"k={k} of 40"):
            threshold(X, k)


def test_half_precision_is_averaged_in_float32():
    x = (100 + X).astype(jnp.bfloat16)
    assert soft_top_k(x, 6).dtype == jnp.bfloat16
    assert threshold(x, 6).dtype == jnp.float32


def test_of_allowed_entries_only_these_are_averaged():
    allowed = jnp.arange(40)[None] < jnp.asarray([40, 25, 5])[:, None]
    chosen = among(X, allowed, 6)
    for row, count in enumerate((40, 25)):
        alone = X[row, :count]
        np.testing.assert_array_equal(chosen[row, :count], alone >= threshold(alone, 6))
        assert 0 < chosen[row].sum() < count
        assert not chosen[row, count:].any()
    np.testing.assert_array_equal(chosen[2], allowed[2])  # not more than k: all


def test_something_is_chosen_where_all_are_equal_and_nothing_where_none_is_allowed():
    assert among(jnp.full((1, 40), 0.1), jnp.ones((1, 40), bool), 6).any()
    assert not among(X[:1], jnp.zeros((1, 40), bool), 6).any()
    # One of very many: the threshold lies above them all.
    assert among(X.reshape(1, -1), jnp.ones((1, 120), bool), 1).sum() >= 1
