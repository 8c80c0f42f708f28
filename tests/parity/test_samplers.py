"""DPM-Solver++ and a flow's Euler steps against diffusers' schedulers, with networks that both compute."""

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from effjax.diffusion.ddpm import DDPM
from effjax.diffusion.denoiser import memoryless
from effjax.diffusion.examples import example_noise
from effjax.diffusion.rectified_flow import RectifiedFlow
from effjax.diffusion.samplers import DPMSolverSampler, EulerSampler, sample
from tests.diffusion.test_samplers import KEYS, LABEL, SHAPE


def theirs(order, steps, x):
    """Pictures of diffusers, in float64."""
    scheduler = diffusers.DPMSolverMultistepScheduler(
        solver_order=order,
        beta_start=1e-4,
        beta_end=0.02,
        timestep_spacing="linspace",
        final_sigmas_type="zero",
        algorithm_type="dpmsolver++",
    )
    scheduler.set_timesteps(steps)
    x = torch.tensor(np.asarray(x, np.float64))
    for t in scheduler.timesteps:
        x = scheduler.step(torch.tanh(1.1 * x + float(t) / 1000), t, x).prev_sample
    return x.numpy()


def network(x_t, t, label):
    return jnp.tanh(1.1 * x_t + t[:, None, None, None] / 1000)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", [4, 10, 14])  # with 15 and more diffusers ends with the full order
def test_dpm_solver_draws_the_same_pictures(order, steps):
    got = sample(DPMSolverSampler(steps, order), memoryless(network), DDPM(sigma="small"), LABEL, SHAPE, KEYS)
    want = theirs(order, steps, example_noise(KEYS, 0, SHAPE))
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=0)


@pytest.mark.parametrize("steps", [1, 4, 25])
def test_euler_draws_the_same_pictures(steps):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=np.arange(steps, 0, -1) / steps)
    first = example_noise(KEYS, 0, SHAPE)
    x = torch.tensor(np.asarray(first))
    for t in scheduler.timesteps:
        x = scheduler.step(torch.tanh(1.1 * x + float(t) / 1000), t, x).prev_sample
    flow = memoryless(lambda x_t, t, label: jnp.tanh(1.1 * x_t + t[:, None, None, None]))
    got = sample(EulerSampler(steps), flow, RectifiedFlow(), LABEL, SHAPE, KEYS)
    np.testing.assert_allclose(got, x.numpy(), atol=1e-5 * np.abs(x.numpy()).max(), rtol=0)
