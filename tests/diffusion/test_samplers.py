"""Samplers with denoisers whose answer is known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.diffusion.ddpm import DDPM
from effjax.diffusion.denoiser import memoryless
from effjax.diffusion.examples import example_keys, example_noise
from effjax.diffusion.rectified_flow import RectifiedFlow
from effjax.diffusion.samplers import (
    KINDS,
    DDIMSampler,
    DDPMSampler,
    EulerSampler,
    HeunSampler,
)
from effjax.diffusion.samplers import sample as sample_by
from effjax.diffusion.samplers import trajectory as trajectory_by
from effjax.diffusion.schedules import posterior, spaced
from effjax.errors import UsageError

SHAPE = (2, 2, 1)
PLAIN = DDPM(sigma="small")
LABEL = jnp.arange(3)
PICTURES = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, size=(3, *SHAPE)), jnp.float32)
KEYS = example_keys(jax.random.key(7), LABEL)


def sample(sampler, network, *rest):
    return sample_by(sampler, memoryless(network), *rest)


def trajectory(sampler, network, *rest):
    return trajectory_by(sampler, memoryless(network), *rest)


def knowing(process):
    """A denoiser that knows each label's picture and so the exact noise (or velocity)."""

    def denoise(x_t, t, label):
        x0 = PICTURES[label]
        if isinstance(process, RectifiedFlow):
            return (x_t - x0) / t[:, None, None, None]
        a = jnp.asarray(process.alpha_bar(), jnp.float32)[t][:, None, None, None]
        eps = (x_t - jnp.sqrt(a) * x0) / jnp.sqrt(1 - a)
        v = jnp.sqrt(a) * eps - jnp.sqrt(1 - a) * x0
        return {"epsilon": eps, "x0": x0, "v": v}[process.prediction]

    return denoise


@pytest.mark.parametrize(
    ("sampler", "process", "tolerance"),
    [
        (DDIMSampler(steps=1), DDPM(sigma="small", prediction="x0"), 0.0),
        (DDIMSampler(steps=7), DDPM(sigma="small", prediction="v"), 1e-5),
        (DDIMSampler(steps=50), PLAIN, 1e-4),
        (DDIMSampler(steps=10, eta=1.0), PLAIN, 1e-4),
        (DDPMSampler(steps=1), PLAIN, 5e-4),
        (DDPMSampler(steps=20), PLAIN, 1e-4),
        (DDPMSampler(steps=20), DDPM(sigma="large", schedule="cosine", prediction="x0"), 1e-6),
        (EulerSampler(steps=1), RectifiedFlow(), 1e-6),
        (EulerSampler(steps=6), RectifiedFlow(), 1e-5),
    ],
)
def test_perfect_denoiser_gives_the_picture(sampler, process, tolerance):
    got = sample(sampler, knowing(process), process, LABEL, SHAPE, KEYS)
    np.testing.assert_allclose(got, PICTURES, atol=tolerance, rtol=0)


def test_ddim_is_exact_for_gaussian_data_as_steps_grow():
    """Data N(0, s^2): the ODE maps noise z to s z, and DDIM approaches it with first order."""
    s, process = 0.5, PLAIN
    a = jnp.asarray(process.alpha_bar(), jnp.float32)

    def denoise(x_t, t, label):  # E[eps | x_t]
        at = a[t][:, None, None, None]
        return jnp.sqrt(1 - at) / (at * s**2 + 1 - at) * x_t

    start = example_noise(KEYS, 0, SHAPE)
    errors = [
        float(jnp.max(jnp.abs(sample(DDIMSampler(n), denoise, process, LABEL, SHAPE, KEYS) - s * start)))
        for n in (20, 80)
    ]
    assert errors[1] < 0.4 * errors[0]
    assert errors[1] < 0.05


def test_heun_is_of_second_order_and_euler_of_first():
    """The velocity of Gaussian data N(0, s^2); the flow ends at s z."""
    s = 0.5

    def denoise(x_t, t, label):
        t = t[:, None, None, None]
        variance = (1 - t) ** 2 * s**2 + t**2
        return (t - (1 - t) * s**2) / variance * x_t

    start = example_noise(KEYS, 0, SHAPE)

    def error(sampler):
        return float(
            jnp.max(jnp.abs(sample(sampler, denoise, RectifiedFlow(), LABEL, SHAPE, KEYS) - s * start))
        )

    assert 1.6 < error(EulerSampler(20)) / error(EulerSampler(40)) < 2.4
    assert 3.0 < error(HeunSampler(10)) / error(HeunSampler(20)) < 5.0
    assert error(HeunSampler(10)) < error(EulerSampler(20))


@pytest.mark.parametrize("sigma", ["small", "large"])
def test_ancestral_variance_follows_its_recursion(sigma):
    """Data N(0, s^2): every step is linear in x, so the variance after each is known in float64."""
    s, process = 0.5, DDPM(steps=100, sigma=sigma)
    a = process.alpha_bar()
    slope = np.sqrt(1 - a) / (a * s**2 + 1 - a)  # E[eps | x_t] = slope x_t

    def denoise(x_t, t, label):
        return jnp.asarray(slope, jnp.float32)[t][:, None, None, None] * x_t

    times, variance = spaced(100, 40), 1.0
    chain = posterior(a[times[::-1]])
    for n, t in zip(reversed(range(40)), times, strict=True):
        estimate = (1 - np.sqrt(1 - a[t]) * slope[t]) / np.sqrt(a[t])
        variance *= (chain.x0_weight[n] * estimate + chain.x_weight[n]) ** 2
        variance += n and np.exp((chain.log_small if sigma == "small" else chain.log_large)[n])

    keys = example_keys(jax.random.key(0), jnp.arange(2))
    x = sample(DDPMSampler(40), denoise, process, jnp.zeros(2, jnp.int32), (128, 128, 1), keys)
    assert float(jnp.var(x)) == pytest.approx(variance, rel=0.03)
    assert variance == pytest.approx(s**2, rel=0.6)  # and it is about the data's


def test_ddpm_with_small_variance_is_ddim_with_eta_1():
    def denoise(x_t, t, label):
        return jnp.tanh(x_t + 0.1 * label[:, None, None, None])

    ancestral = sample(DDPMSampler(15), denoise, PLAIN, LABEL, SHAPE, KEYS)
    implicit = sample(DDIMSampler(15, eta=1.0), denoise, PLAIN, LABEL, SHAPE, KEYS)
    np.testing.assert_allclose(ancestral, implicit, rtol=1e-3, atol=1e-3)
    assert (
        float(jnp.max(jnp.abs(ancestral - sample(DDIMSampler(15), denoise, PLAIN, LABEL, SHAPE, KEYS)))) > 0.1
    )


@pytest.mark.parametrize(("share", "fixed"), [(-1.0, "small"), (1.0, "large")])
def test_learned_variance_lies_between_the_fixed_ones(share, fixed):
    def denoise(x_t, t, label):
        return 0.5 * x_t

    def learned(x_t, t, label):
        return jnp.concatenate([0.5 * x_t, jnp.full_like(x_t, share)], axis=-1)

    # The bounds are those of the shortened chain, whose steps are far longer than the schedule's.
    expected = sample(DDPMSampler(9), denoise, DDPM(sigma=fixed), LABEL, SHAPE, KEYS)
    got = sample(DDPMSampler(9), learned, DDPM(), LABEL, SHAPE, KEYS)
    np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_a_picture_does_not_depend_on_its_batch():
    def denoise(x_t, t, label):
        return jnp.sin(x_t) + label[:, None, None, None]

    run = jax.jit(lambda label, keys: sample(DDPMSampler(5), denoise, PLAIN, label, SHAPE, keys))
    whole = run(LABEL, KEYS)
    parts = jnp.concatenate([run(LABEL[i : i + 1], KEYS[i : i + 1]) for i in range(3)])
    np.testing.assert_allclose(parts, whole, rtol=1e-6, atol=1e-6)
    same_label = run(jnp.zeros(3, jnp.int32), KEYS)
    assert len({float(v) for v in same_label[:, 0, 0, 0]}) == 3  # keys differ, so pictures do


def test_noise_of_steps_and_examples_differs():
    draws = jnp.stack([example_noise(KEYS, step, (50,)) for step in range(3)]).reshape(9, 50)
    correlation = np.corrcoef(np.asarray(draws)) - np.eye(9)
    assert np.max(np.abs(correlation)) < 0.6


def test_clip_bounds_every_estimate():
    def denoise(x_t, t, label):
        return -x_t

    for sampler in (DDPMSampler(5, clip=1.0), DDIMSampler(5, clip=1.0)):
        steps = trajectory(sampler, denoise, PLAIN, LABEL, SHAPE, KEYS)
        assert float(jnp.max(jnp.abs(steps))) == 1.0
        loose = trajectory(dataclasses.replace(sampler, clip=None), denoise, PLAIN, LABEL, SHAPE, KEYS)
        assert float(jnp.max(jnp.abs(loose))) > 1.5


def test_clipped_step_by_hand():
    """A clipped estimate takes along the noise that fits it, here for some values and not for others."""

    def denoise(x_t, t, label):
        return 0.99 * x_t

    a, x = PLAIN.alpha_bar()[spaced(1000, 3)], np.asarray(example_noise(KEYS, 0, SHAPE), np.float64)
    clipped = 0
    for now, after in zip(a, [a[1], a[2], 1.0], strict=True):
        estimate = x * (1 - 0.99 * np.sqrt(1 - now)) / np.sqrt(now)
        x0 = np.clip(estimate, -1, 1)
        clipped += np.sum(x0 != estimate)
        x = np.sqrt(after) * x0 + np.sqrt(1 - after) * (x - np.sqrt(now) * x0) / np.sqrt(1 - now)
    assert 0 < clipped < x.size
    got = sample(DDIMSampler(3, clip=1.0), denoise, PLAIN, LABEL, SHAPE, KEYS)
    np.testing.assert_allclose(got, x, atol=1e-4)


def test_trajectory_ends_at_the_sample():
    steps = trajectory(DDIMSampler(4), knowing(PLAIN), PLAIN, LABEL, SHAPE, KEYS)
    assert steps.shape == (4, 3, *SHAPE)
    np.testing.assert_array_equal(
        steps[-1], sample(DDIMSampler(4), knowing(PLAIN), PLAIN, LABEL, SHAPE, KEYS)
    )
    for estimate in steps[1:]:
        np.testing.assert_allclose(estimate, PICTURES, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "process", "message"),
    [
        (
            "ddim",
            RectifiedFlow(),
            "'ddim' does not walk a rectified_flow process: take euler, heun or dpm_s",
        ),
        ("heun", DDPM(), "'heun' does not walk a ddpm process: take ddpm, ddim or dpm_solver"),
        ("ddpm", DDPM(steps=100), "schedule has 100 steps"),
    ],
)
def test_misfits(kind, process, message):
    with pytest.raises(UsageError, match=message):
        KINDS[kind]().plan(process)


def test_no_steps():
    with pytest.raises(UsageError, match="at least 1 step"):
        EulerSampler(steps=0).plan(RectifiedFlow())
