"""Schedules: their ends, their identities, and the claim of the budget-aware one."""

import itertools

import jax
import numpy as np
import optax
import pytest

from effjax.config import build_kind
from effjax.errors import UsageError
from effjax.train.durations import Budget
from effjax.train.schedules import KINDS, Constant, Cosine, Linear, UnifiedBudgetAware, WarmupStableDecay

BUDGET = Budget(total_steps=100, batch_size=10, dataset_size=100)
PHIS = (0.25, 0.5, 1.0, 2.0, 4.0, 10.0)


def curve(schedule, peak=1.0, budget=BUDGET):
    return np.asarray(jax.vmap(schedule.make(peak, budget))(np.arange(budget.total_steps + 1)), np.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_warms_up_to_its_peak_and_is_traceable(kind):
    section = dict(kind=kind, warmup="1 epoch", **({"phi": 1.0} if kind == "uba" else {}))
    schedule = build_kind(KINDS, section, "config.optimizer.schedule")
    values = curve(schedule, peak=3.0)
    np.testing.assert_allclose(values[:11], 3.0 * np.arange(11) / 10, rtol=1e-6)
    assert values.max() <= 3.0 * (1 + 1e-6)
    np.testing.assert_allclose(values[-1], 3.0 if kind == "constant" else 0.0, atol=1e-6)
    # Asked past its end, a schedule stays where it ended.
    np.testing.assert_allclose(schedule.make(3.0, BUDGET)(150), values[-1], atol=1e-6)


def test_warmup_cosine_is_that_of_optax():
    theirs = optax.warmup_cosine_decay_schedule(0.0, 2.0, 10, 100, end_value=0.2)
    ours = curve(Cosine(warmup="10%", end=0.1), peak=2.0)
    np.testing.assert_allclose(ours, [theirs(s) for s in range(101)], atol=1e-6)


def test_constant_and_linear():
    np.testing.assert_array_equal(curve(Constant()), 1.0)
    np.testing.assert_allclose(curve(Linear(end=0.5)), 1 - 0.5 * np.arange(101) / 100, atol=1e-6)


@pytest.mark.parametrize(("shape", "half"), [("linear", 0.5), ("sqrt", 1 - np.sqrt(0.5)), ("cosine", 0.5)])
def test_warmup_stable_decay(shape, half):
    values = curve(WarmupStableDecay(warmup="10 steps", decay="20%", shape=shape, end=0.1))
    np.testing.assert_allclose(values[10:81], 1.0, atol=1e-6)
    np.testing.assert_allclose(values[90], 0.1 + 0.9 * half, atol=1e-6)
    np.testing.assert_allclose(values[100], 0.1, atol=1e-6)
    assert (np.diff(values[80:]) < 0).all()


@pytest.mark.parametrize("phi", PHIS)
def test_uba_falls_from_peak_to_end(phi):
    values = curve(UnifiedBudgetAware(phi=phi, end=0.2), peak=5.0)
    np.testing.assert_allclose(values[[0, -1]], [5.0, 1.0], rtol=1e-6)
    assert (np.diff(values) < 0).all()


def test_uba_is_cosine_annealing_at_two():
    np.testing.assert_allclose(curve(UnifiedBudgetAware(phi=2.0)), curve(Cosine()), atol=1e-6)


@pytest.mark.parametrize("phi", PHIS)
def test_uba_scales_the_odds_of_the_cosine(phi):
    inner = slice(5, 96)
    u = np.arange(101)[inner] / 100
    f = curve(UnifiedBudgetAware(phi=phi))[inner]
    np.testing.assert_allclose(f / (1 - f), 2 / phi / np.tan(np.pi * u / 2) ** 2, rtol=2e-4)


@pytest.mark.parametrize("phi", PHIS)
def test_uba_turned_by_half_a_turn_is_uba_with_four_over_phi(phi):
    turned = 1 - curve(UnifiedBudgetAware(phi=4 / phi))[::-1]
    np.testing.assert_allclose(curve(UnifiedBudgetAware(phi=phi)), turned, atol=1e-6)


def test_uba_decays_faster_the_larger_phi_and_tends_to_constant():
    curves = [curve(UnifiedBudgetAware(phi=phi))[1:-1] for phi in PHIS]
    assert all((slower > faster).all() for slower, faster in itertools.pairwise(curves))
    assert curve(UnifiedBudgetAware(phi=1e-6))[95] > 0.999


def final_loss(rates, condition, noise):
    """The expected loss of stochastic gradient descent on a quadratic, exactly, by the recursion of E[w^2].

    Eigenvalues are spread geometrically over [1 / condition, 1]; the gradient noise has the Hessian's
    covariance.
    """
    eigenvalues = np.geomspace(1 / condition, 1.0, 20)
    second_moment = np.ones(20)
    for rate in rates:
        second_moment = (1 - rate * eigenvalues) ** 2 * second_moment + rate**2 * noise * eigenvalues
    return float(np.mean(eigenvalues * second_moment) / 2)


def sweep(steps, condition, noise):
    phis = 2.0 ** np.arange(-4, 6.5, 0.5)
    curves = [
        curve(UnifiedBudgetAware(phi=float(phi)), budget=Budget(total_steps=steps))[:-1] for phi in phis
    ]
    losses = [final_loss(rates, condition, noise) for rates in curves]
    return phis[int(np.argmin(losses))], min(losses)


def test_uba_on_a_noisy_quadratic():
    # The best phi moves one way with the condition number: slow directions need the rate held up for longer.
    best = [sweep(steps=100, condition=c, noise=0.1)[0] for c in (5, 30, 300)]
    assert best[0] > 2 * best[1] > 4 * best[2], best
    # And at a short budget the best of the family beats step decay (x 0.1 at a half and at three quarters).
    u = np.arange(30) / 30
    steps = np.where(u < 0.5, 1.0, np.where(u < 0.75, 0.1, 0.01))
    for condition in (5, 30, 300):
        for noise in (0.01, 0.1):
            assert sweep(30, condition, noise)[1] < 0.75 * final_loss(steps, condition, noise)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cosine(warmup="100 steps").make(1.0, BUDGET), "the whole run has 100. Make it shorter"),
        (lambda: WarmupStableDecay(warmup="60%", decay="60%").make(1.0, BUDGET), "longer than the run"),
        (lambda: UnifiedBudgetAware(phi=0.0), "phi must be positive"),
        (lambda: Linear(end=2.0), "end is a fraction of the peak"),
        (lambda: build_kind(KINDS, {"kind": "cosin"}, "config.s"), "Did you mean 'cosine'"),
    ],
)
def test_what_cannot_be_is_said(make, message):
    with pytest.raises(UsageError, match=message):
        make()
