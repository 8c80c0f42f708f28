import math

import numpy as np
import pytest

from effjax.diffusion.schedules import alpha_bars, cosine_betas, linear_betas, posterior, spaced
from effjax.errors import UsageError


def test_linear_schedule():
    betas = linear_betas(1000)
    assert betas.dtype == np.float64
    assert betas[0] == 1e-4
    assert betas[-1] == 0.02
    assert betas[500] == pytest.approx(1e-4 + (0.02 - 1e-4) * 500 / 999)
    # The figure of Ho et al.: almost nothing of the picture is left after 1000 steps.
    assert alpha_bars("linear", 1000)[-1] == pytest.approx(4.036e-5, rel=1e-3)
    # Fewer steps end about as noisy.
    assert alpha_bars("linear", 100)[-1] == pytest.approx(4e-5, rel=0.5)


def test_cosine_schedule():
    alpha_bar = alpha_bars("cosine", 1000)

    def f(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (0, 1, 499, 990):
        assert alpha_bar[t] == pytest.approx(f(t + 1) / f(0), rel=1e-9)
    assert cosine_betas(1000)[-1] == 0.999  # the cap


def test_posterior_by_bayes():
    """q(x_{t-1}|x_t,x_0) from the product of q(x_t|x_{t-1}) and q(x_{t-1}|x_0), as precisions."""
    alpha_bar = alpha_bars("linear", 1000)
    got = posterior(alpha_bar)
    for t in (1, 2, 500, 999):
        beta, before = linear_betas(1000)[t], alpha_bar[t - 1]
        precision = (1 - beta) / beta + 1 / (1 - before)
        assert np.exp(got.log_small[t]) == pytest.approx(1 / precision, rel=1e-9)
        assert got.x_weight[t] == pytest.approx(math.sqrt(1 - beta) / beta / precision, rel=1e-9)
        assert got.x0_weight[t] == pytest.approx(math.sqrt(before) / (1 - before) / precision, rel=1e-9)
        assert np.exp(got.log_large[t]) == pytest.approx(beta, rel=1e-9)
    # The first step leads to the clean picture, whatever x_t was.
    assert got.x0_weight[0] == pytest.approx(1.0)
    assert got.x_weight[0] == 0.0
    assert got.log_small[0] == got.log_small[1]
    assert got.log_fixed_large[0] == got.log_small[1]
    np.testing.assert_array_equal(got.log_fixed_large[1:], got.log_large[1:])


def test_posterior_mean_keeps_the_marginal():
    """Noising by one posterior step gives the marginal of t - 1: weights of x_0 and of noise add up."""
    alpha_bar = alpha_bars("cosine", 50)
    got = posterior(alpha_bar)
    t = np.arange(1, 50)
    signal = got.x0_weight[t] + got.x_weight[t] * np.sqrt(alpha_bar[t])
    variance = got.x_weight[t] ** 2 * (1 - alpha_bar[t]) + np.exp(got.log_small[t])
    np.testing.assert_allclose(signal, np.sqrt(alpha_bar[t - 1]), rtol=1e-9)
    np.testing.assert_allclose(variance, 1 - alpha_bar[t - 1], rtol=1e-9)


def test_spacing():
    assert spaced(10, 4).tolist() == [9, 6, 3, 0]
    assert spaced(1000, 1000).tolist() == list(range(999, -1, -1))
    assert spaced(1000, 1).tolist() == [999]
    assert spaced(1000, 250)[:3].tolist() == [999, 995, 991]
    assert len(set(spaced(1000, 999).tolist())) == 999


@pytest.mark.parametrize("wanted", [0, -1, 11])
def test_steps_beyond_the_schedule(wanted):
    with pytest.raises(UsageError, match=rf"steps={wanted}.*schedule has 10 steps.*between 1 and 10"):
        spaced(10, wanted)


def test_linear_schedule_that_is_too_short():
    with pytest.raises(UsageError, match="21 or more"):
        linear_betas(20)
    assert linear_betas(21)[-1] < 1
