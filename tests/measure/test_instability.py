"""Which runs went astray, against curves whose answer is known."""

import numpy as np
import pytest

from effjax.errors import UsageError
from effjax.measure.instability import diverged, running, sensitivity, spikes, stability


def falling(steps=300, start=5.0, end=2.0):
    return end + (start - end) * np.exp(-np.arange(steps) / 40)


def test_running_means_are_those_of_a_loop(draw):
    losses = draw.normal(size=(2, 30))
    expected = [[row[i : i + 7].mean() for i in range(24)] for row in losses]
    np.testing.assert_allclose(running(losses, 7), expected, atol=1e-12)


def test_only_a_run_that_does_not_come_back_diverged():
    good = falling()
    bump = good.copy()
    bump[100:130] += 3  # comes back
    lost = good.copy()
    lost[200:] += 1
    gone = good.copy()
    gone[250:] = np.nan
    once = good.copy()
    once[10] = np.inf
    np.testing.assert_array_equal(
        diverged(np.stack([good, bump, lost, gone, once])), [False, False, True, True, True]
    )
    assert not diverged(lost, rise=1.1)


def test_spikes_are_steps_far_above_those_before(draw):
    curve = 2 + 0.01 * draw.normal(size=500)
    assert spikes(curve) == 0
    curve[[200, 400]] = 2.5
    curve[290] = 1.0  # below is no spike
    assert spikes(curve) == 2
    curve[450] = np.nan
    assert spikes(curve) == 3
    by_hand = sum(
        not curve[i] <= curve[i - 50 : i].mean() + 7 * curve[i - 50 : i].std() for i in range(50, 449)
    )
    assert spikes(curve[:449], window=50) == by_hand


def test_sensitivity_is_the_mean_loss_beyond_the_best_and_a_lost_run_costs_the_first_loss():
    assert sensitivity(np.array([2.0, 2.0, 2.0]), first=5.0) == 0
    np.testing.assert_allclose(
        sensitivity(np.array([2.0, 3.0, np.nan, 900.0]), first=5.0), (0 + 1 + 3 + 3) / 4
    )


def test_formats_are_summed_up():
    lost = falling()
    lost[150:] = 4.0
    curves = np.stack([[falling(), falling()], [falling(end=1.5), falling(end=1.5)], [lost, falling()]])
    found = stability(curves, (1e-3, 1e-2, 1e-1))
    assert found.diverged == (0, 0, 1)
    assert found.threshold == 1e-1
    assert found.spikes[:2] == (0, 0)
    np.testing.assert_allclose(found.ends, [2, 1.5, 2], atol=0.01)
    np.testing.assert_allclose(found.sensitivity, (0.5 + 0 + (2.5 + 0.5) / 2) / 3, atol=0.01)
    assert stability(curves[:2], (1e-3, 1e-2)).threshold is None


def test_bad_requests_are_refused():
    with pytest.raises(UsageError, match="window=400 must be from 1 to the 300 steps"):
        diverged(falling(), window=400)
    with pytest.raises(UsageError, match="none after window=300"):
        spikes(falling(), window=300)
    with pytest.raises(UsageError, match="need as many rising learning rates"):
        stability(np.zeros((2, 1, 200)), (1e-2, 1e-3))
