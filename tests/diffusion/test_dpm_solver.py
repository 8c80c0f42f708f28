"""DPM-Solver++ on Gaussian data, whose ODE has a closed form."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from effjax.diffusion.ddpm import DDPM
from effjax.diffusion.denoiser import memoryless
from effjax.diffusion.examples import example_noise
from effjax.diffusion.rectified_flow import RectifiedFlow
from effjax.diffusion.samplers import DPMSolverSampler, EulerSampler, sample, trajectory
from effjax.errors import UsageError
from tests.diffusion.test_samplers import KEYS, LABEL, PICTURES, SHAPE, knowing

CHAIN, DEVIATION = DDPM(sigma="small", prediction="x0"), 0.5


def run(sampler, network, process):
    return sample(sampler, memoryless(network), process, LABEL, SHAPE, KEYS)


def of_gaussians(process):
    """The best guess at a picture of N(0, s^2), or at its flow's velocity."""

    def network(x_t, t, label):
        if isinstance(process, RectifiedFlow):
            alpha, sigma = 1 - t, t
        else:
            alpha_bar = jnp.asarray(process.alpha_bar(), jnp.float32)[t]
            alpha, sigma = jnp.sqrt(alpha_bar), jnp.sqrt(1 - alpha_bar)
        alpha, sigma = alpha[:, None, None, None], sigma[:, None, None, None]
        x0 = alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2) * x_t
        return x0 if isinstance(process, DDPM) else (x_t - x0) / sigma

    return network


def errors(process, order, counts):
    start = example_noise(KEYS, 0, SHAPE)
    got = [run(DPMSolverSampler(steps, order), of_gaussians(process), process) for steps in counts]
    return [float(jnp.max(jnp.abs(x - DEVIATION * start))) for x in got]


@pytest.mark.parametrize("process", [CHAIN, DDPM(sigma="small", prediction="v"), RectifiedFlow()])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_perfect_denoiser_gives_the_picture(process, order, steps):
    got = run(DPMSolverSampler(steps, order), knowing(process), process)
    np.testing.assert_allclose(got, PICTURES, atol=2e-5)


def test_higher_orders_are_nearer():
    first, second, third = (errors(RectifiedFlow(), order, (8, 64)) for order in (1, 2, 3))
    assert 6 < first[0] / first[1] < 9  # eight times as many steps
    assert second[0] < 0.3 * first[0]
    assert second[1] < 0.15 * first[1]
    assert third[0] < 0.5 * second[0]


@pytest.mark.parametrize("order", [1, 2, 3])
def test_pictures_are_those_of_diffusers(order):
    """Ten steps of a network that both can compute, recorded by `tests/parity/test_samplers.py`."""
    recorded = np.load(Path(__file__).parent / "fixtures" / "dpm_solver.npz")
    np.testing.assert_array_equal(recorded["start"], example_noise(KEYS, 0, SHAPE))

    def network(x_t, t, label):
        return jnp.tanh(1.1 * x_t + t[:, None, None, None] / 1000)

    got = run(DPMSolverSampler(10, order), network, DDPM(sigma="small"))
    want = recorded[f"order_{order}"]
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=0)


def test_fewer_steps_do_than_with_eulers():
    start = example_noise(KEYS, 0, SHAPE)
    straight = run(EulerSampler(32), of_gaussians(RectifiedFlow()), RectifiedFlow())
    euler = float(jnp.max(jnp.abs(straight - DEVIATION * start)))
    assert errors(RectifiedFlow(), 2, (10,))[0] < euler


def test_of_order_1_it_is_ddim():
    """x' = alpha' x0 + sigma' eps at every step, here by hand at the solver's own times."""
    network, x = of_gaussians(CHAIN), example_noise(KEYS, 0, SHAPE)
    plan = DPMSolverSampler(6, order=1).plan(CHAIN)
    alpha_bar = np.append(CHAIN.alpha_bar()[plan["t"]], 1.0)
    for i, t in enumerate(plan["t"]):
        x0 = network(x, jnp.full(3, t), LABEL)
        eps = (x - np.sqrt(alpha_bar[i]) * x0) / np.sqrt(1 - alpha_bar[i])
        x = np.float32(np.sqrt(alpha_bar[i + 1])) * x0 + np.float32(np.sqrt(1 - alpha_bar[i + 1])) * eps
    np.testing.assert_allclose(run(DPMSolverSampler(6, order=1), network, CHAIN), x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("sampler", "process", "message"),
    [
        (DPMSolverSampler(steps=0), CHAIN, "steps=0 cannot be sampled"),
        (DPMSolverSampler(steps=1000), CHAIN, "between 1 and 999"),
        (DPMSolverSampler(steps=0), RectifiedFlow(), "at least 1 step"),
    ],
)
def test_refusals(sampler, process, message):
    with pytest.raises(UsageError, match=message):
        sampler.plan(process)


@pytest.mark.parametrize("process", [CHAIN, RectifiedFlow()])
def test_clipped_estimates_stay_in_bounds(process):
    def network(x_t, t, label):
        return 3.0 * x_t

    steps = trajectory(DPMSolverSampler(4, clip=1.0), memoryless(network), process, LABEL, SHAPE, KEYS)
    assert float(jnp.max(jnp.abs(steps))) == 1.0
