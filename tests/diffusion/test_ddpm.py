"""The discrete process against the formulas of its papers in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.diffusion.ddpm import DDPM
from effjax.diffusion.schedules import alpha_bars, linear_betas
from effjax.errors import UsageError

ALPHA_BAR = alpha_bars("linear", 1000)


def drawn(count=6, shape=(3, 3, 2), seed=0):
    draw = np.random.default_rng(seed)
    x0 = draw.uniform(-0.95, 0.95, size=(count, *shape)).astype(np.float32)
    eps = draw.normal(size=(count, *shape)).astype(np.float32)
    t = np.array([0, 1, 10, 400, 900, 999][:count], np.int32)
    return jnp.asarray(x0), jnp.asarray(eps), jnp.asarray(t)


def column(values):
    return np.asarray(values, np.float64)[:, None, None, None]


def test_noise_is_q_sample():
    x0, eps, t = drawn()
    a = column(ALPHA_BAR[t])
    expected = np.sqrt(a) * np.asarray(x0, np.float64) + np.sqrt(1 - a) * np.asarray(eps, np.float64)
    np.testing.assert_allclose(DDPM().noise(x0, eps, t), expected, rtol=1e-6, atol=1e-6)


def test_moments_of_the_noisy_picture():
    x0 = jnp.full((1, 200, 200, 1), 0.7)
    eps = jnp.asarray(np.random.default_rng(1).normal(size=x0.shape), jnp.float32)
    for t in (0, 300, 999):
        x_t = np.asarray(DDPM().noise(x0, eps, jnp.array([t])))
        assert x_t.mean() == pytest.approx(0.7 * math.sqrt(ALPHA_BAR[t]), abs=0.02)
        assert x_t.var() == pytest.approx(1 - ALPHA_BAR[t], rel=0.03)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_target_reads_back_as_picture_and_noise(prediction, schedule):
    process = DDPM(prediction=prediction, schedule=schedule)
    x0, eps, t = drawn(5)  # at 999 hardly anything of the picture is left to read back
    got_x0, got_eps = process.to_x0_eps(process.target(x0, eps, t), process.noise(x0, eps, t), t)
    np.testing.assert_allclose(got_x0, x0, atol=2e-5)
    np.testing.assert_allclose(
        got_eps, eps, atol=2e-4
    )  # at t = 0 noise has a hundredth of the picture's weight


def test_v_is_the_derivative_along_the_circle():
    x0, eps, t = drawn()
    a = column(ALPHA_BAR[t])
    v = DDPM(prediction="v").target(x0, eps, t)
    np.testing.assert_allclose(v, np.sqrt(a) * eps - np.sqrt(1 - a) * x0, rtol=1e-5, atol=1e-6)


def reference_vlb(x0, x_t, mean_eps, share, t):
    """One term of the bound in bits a dimension, for one example, in float64."""
    betas = linear_betas(1000)
    a, before = ALPHA_BAR[t], ALPHA_BAR[t - 1] if t else 1.0
    small = betas[max(t, 1)] * (1 - ALPHA_BAR[max(t, 1) - 1]) / (1 - ALPHA_BAR[max(t, 1)])

    def mean(clean):
        return (math.sqrt(before) * betas[t] * clean + math.sqrt(1 - betas[t]) * (1 - before) * x_t) / (1 - a)

    estimate = (x_t - math.sqrt(1 - a) * mean_eps) / math.sqrt(a)
    log_variance = (share + 1) / 2 * math.log(betas[t]) + (1 - share) / 2 * math.log(small)
    if t == 0:
        sd = np.exp(0.5 * log_variance)
        cdf = np.vectorize(lambda z: 0.5 * math.erfc(-z / math.sqrt(2)))
        p = cdf((x0 - estimate + 1 / 255) / sd) - cdf((x0 - estimate - 1 / 255) / sd)
        return -np.log(np.maximum(p, 1e-12)).mean() / math.log(2)
    kl = 0.5 * (
        log_variance - math.log(small) + (small + (mean(x0) - mean(estimate)) ** 2) / np.exp(log_variance) - 1
    )
    return kl.mean() / math.log(2)


def test_hybrid_loss_is_that_of_improved_ddpm():
    process = DDPM()
    x0, eps, t = drawn()
    draw = np.random.default_rng(3)
    mean = (np.asarray(eps) + 0.1 * draw.normal(size=eps.shape)).astype(np.float32)
    share = draw.uniform(-1, 1, size=eps.shape).astype(np.float32)
    got = process.loss(jnp.concatenate([mean, share], axis=-1), x0, eps, t)
    x_t = np.asarray(process.noise(x0, eps, t), np.float64)
    for i in range(len(t)):
        mse = np.mean((mean[i].astype(np.float64) - np.asarray(eps[i])) ** 2)
        vlb = reference_vlb(np.asarray(x0[i], np.float64), x_t[i], mean[i], share[i], int(t[i]))
        assert float(got["mse"][i]) == pytest.approx(mse, rel=1e-5)
        assert float(got["vlb"][i]) == pytest.approx(vlb, rel=2e-3)
        assert float(got["loss"][i]) == pytest.approx(
            mse + vlb, rel=2e-3
        )  # weight 0.001 x 1000 steps, as in DiT


def test_perfect_prediction_has_no_divergence():
    process = DDPM()
    x0, eps, t = drawn()
    got = process.loss(jnp.concatenate([eps, -jnp.ones_like(eps)], axis=-1), x0, eps, t)
    np.testing.assert_array_equal(got["mse"], 0.0)
    np.testing.assert_allclose(got["vlb"][1:], 0.0, atol=1e-6)
    assert got["vlb"][0] > 0  # the likelihood of the last step is a number of bits, not a divergence


def test_outermost_bins_are_open():
    process = DDPM()
    ones = jnp.ones((2, 2, 2, 1)) * jnp.array([1.0, -1.0])[:, None, None, None]
    t, zero = jnp.zeros(2, jnp.int32), jnp.zeros_like(ones)
    x_t = process.noise(ones, zero, t)
    beyond = -ones  # noise that makes the estimate lie outside [-1, 1]
    assert np.all(process.vlb(beyond, zero, ones, x_t, t) < 0.1)
    assert np.all(process.vlb(-beyond, zero, ones, x_t, t) > 1.0)


def test_bound_trains_the_variance_alone():
    process = DDPM()
    x0, eps, t = drawn()

    def bound(prediction):
        return jnp.sum(process.loss(prediction, x0, eps, t)["vlb"])

    grad = jax.grad(bound)(jnp.concatenate([eps + 0.1, jnp.zeros_like(eps)], axis=-1))
    np.testing.assert_array_equal(grad[..., :2], 0.0)
    assert np.all(np.isfinite(grad))
    assert np.all(np.any(grad[..., 2:] != 0, axis=(1, 2, 3)))


def test_fixed_sigma_has_no_second_half():
    x0, eps, t = drawn()
    process = DDPM(sigma="large")
    assert not process.learned_sigma
    got = process.loss(eps + 1.0, x0, eps, t)
    assert set(got) == {"loss", "mse"}
    np.testing.assert_allclose(got["loss"], 1.0, rtol=1e-6)


def test_times_are_uniform_over_the_chain():
    process = DDPM(steps=1000)
    got = process.times(jnp.array([0.0, 0.4999, 0.5, 1 - 2**-24]))
    assert got.tolist() == [0, 499, 500, 999]
    counts = np.bincount(process.times(jnp.asarray((np.arange(4000) + 0.5) / 4000)))
    assert set(counts.tolist()) == {4}
    np.testing.assert_array_equal(process.network_time(got), got.astype(jnp.float32))


def test_bad_requests():
    with pytest.raises(UsageError, match="at least 2 steps"):
        DDPM(steps=1, schedule="cosine")
    with pytest.raises(UsageError, match="21 or more"):
        DDPM(steps=10)
