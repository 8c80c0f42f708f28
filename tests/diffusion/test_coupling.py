import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.diffusion.coupling import as_flow, check_deterministic, straightness
from effjax.diffusion.ddpm import DDPM
from effjax.diffusion.denoiser import memoryless
from effjax.diffusion.examples import example_keys, example_noise
from effjax.diffusion.rectified_flow import RectifiedFlow
from effjax.diffusion.samplers import EulerSampler, sample
from effjax.diffusion.samplers.chain import DDIMSampler, DDPMSampler
from effjax.errors import UsageError

FLOW = RectifiedFlow()
MEAN, SPREAD = 2.0, 0.5  # of the pictures, which are single numbers


def optimal(x_t, t, condition):
    """The best velocity between N(0, 1) and N(MEAN, SPREAD^2), drawn independently: E[eps - x_0 | x_t]."""
    t = t.reshape(-1, *(1,) * (x_t.ndim - 1))
    variance = (1 - t) ** 2 * SPREAD**2 + t**2
    gain = (t - (1 - t) * SPREAD**2) / variance
    return -MEAN + gain * (x_t - (1 - t) * MEAN)


def straight(x_t, t, condition):
    """The velocity of the coupling x_0 = MEAN + SPREAD eps, whose lines never cross."""
    t = t.reshape(-1, *(1,) * (x_t.ndim - 1))
    eps = (x_t - (1 - t) * MEAN) / ((1 - t) * SPREAD + t)
    return eps - (MEAN + SPREAD * eps)


def draw(velocity, steps, count=4096):
    keys = example_keys(jax.random.key(0), jnp.arange(count))
    return sample(EulerSampler(steps), memoryless(velocity), FLOW, jnp.zeros(count), (1,), keys)


def test_the_flow_between_gaussians_keeps_their_marginals_and_needs_many_steps():
    many = draw(optimal, 400)
    np.testing.assert_allclose([many.mean(), many.std()], [MEAN, SPREAD], atol=0.03)
    one = draw(optimal, 1)
    assert one.std() < 1e-4  # one step from noise alone ends at the mean
    np.testing.assert_allclose(one.mean(), MEAN, atol=0.03)


def test_a_straight_flow_is_as_good_in_one_step():
    np.testing.assert_allclose(draw(straight, 1), draw(straight, 50), atol=1e-4)


def test_straightness_falls_to_zero_where_paths_are_straight():
    """The flow that is best for independent pairs is not straight on the pairs that it makes; the one that is
    best for these is."""
    count = 2048
    noise = jax.random.normal(jax.random.key(1), (count, 1))
    nothing = jnp.zeros(count)
    end = MEAN + SPREAD * noise  # in one dimension the flow keeps the order, so that this is where it ends
    bent = straightness(memoryless(optimal), FLOW, noise, end, nothing).mean()
    level = straightness(memoryless(straight), FLOW, noise, end, nothing).mean()
    assert bent > 0.01
    assert level < 1e-8
    t = (np.arange(20) + 0.5) / 20  # E over x_t of (eps - x_0 - v)^2, in closed form
    rate = (t - (1 - t) * SPREAD**2) / ((1 - t) ** 2 * SPREAD**2 + t**2)
    expected = np.mean(((1 - SPREAD) - rate * ((1 - t) * SPREAD + t)) ** 2)
    np.testing.assert_allclose(bent, expected * np.mean(np.square(noise)), rtol=1e-4)


CENTRES = jnp.float32([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]])
WIDTH = 0.3  # of every blob around its centre


def of_blobs(x_t, t, condition):
    """The best velocity between N(0, 1) and three blobs of the plane, drawn independently."""
    s = (1 - t)[:, None, None]  # [B, 1, 1]
    variance = s**2 * WIDTH**2 + (1 - s) ** 2
    off = x_t[:, None] - s * CENTRES[None]  # [B, K, 2]
    weight = jax.nn.softmax(-0.5 * jnp.sum(off**2, axis=2) / variance[..., 0], axis=1)[..., None]
    x0 = CENTRES[None] + s * WIDTH**2 / variance * off
    return jnp.sum(weight * ((1 - s) / variance * off - x0), axis=1)


def of_pairs(noise, end, bandwidth=0.12):
    """The best velocity on pairs, by their neighbours on the lines: E[eps - x_0 | x_t]."""

    def velocity(x_t, t, condition):
        lines = (1 - t)[:, None, None] * end[None] + t[:, None, None] * noise[None]  # [B, N, 2]
        near = -0.5 * jnp.sum((x_t[:, None] - lines) ** 2, axis=2) / bandwidth**2
        return jax.nn.softmax(near, axis=1) @ (noise - end)

    return velocity


def energy_distance(a, b):
    between = lambda x, y: jnp.mean(jnp.linalg.norm(x[:, None] - y[None], axis=2))
    return float(2 * between(a, b) - between(a, a) - between(b, b))


def test_reflow_straightens_the_way_to_blobs_and_keeps_them():
    @functools.partial(jax.jit, static_argnums=(0, 1))
    def drawn(velocity, steps, keys):
        nothing = jnp.zeros(len(keys))
        return sample(EulerSampler(steps), memoryless(velocity), FLOW, nothing, (2,), keys)

    seen, new = jnp.arange(600), jnp.arange(600, 856)
    noise, end = (
        jnp.concatenate([part(index) for index in (seen, new)])
        for part in (
            lambda index: example_noise(example_keys(jax.random.key(0), index), 0, (2,)),
            lambda index: drawn(of_blobs, 30, example_keys(jax.random.key(0), index)),
        )
    )
    reflowed, nothing = of_pairs(noise[:600], end[:600]), jnp.zeros(256)
    bends = [
        float(straightness(memoryless(v), FLOW, noise[600:], end[600:], nothing).mean())
        for v in (of_blobs, reflowed)
    ]
    assert bends[1] < 0.2 * bends[0]
    keys = example_keys(jax.random.key(0), new)
    errors = [float(jnp.mean((drawn(v, 1, keys) - drawn(v, 20, keys)) ** 2)) for v in (of_blobs, reflowed)]
    assert errors[1] < 0.1 * errors[0]
    pick, spread = jax.random.split(jax.random.key(5))
    real = CENTRES[jax.random.randint(pick, (512,), 0, 3)] + WIDTH * jax.random.normal(spread, (512, 2))
    gaps = [energy_distance(real, found) for found in (end[600:], drawn(reflowed, 1, keys))]
    assert max(gaps) < 0.05 < energy_distance(real, drawn(of_blobs, 1, keys))


def test_a_network_of_noise_is_a_velocity():
    """At a time that the chain has, v x_t = eps - x_0 is an identity of the points x_t on the line."""
    chain = DDPM(schedule="linear", prediction="epsilon", sigma="small")
    draw = np.random.default_rng(0)
    x0, eps = (jnp.asarray(draw.normal(size=(4, 2, 2, 1)), jnp.float32) for _ in range(2))
    s = np.array([10, 300, 600, 900])
    a = chain.alpha_bar()[s]
    t = jnp.asarray(np.sqrt(1 - a) / (np.sqrt(a) + np.sqrt(1 - a)), jnp.float32)
    seen = {}

    def network(x_s, at, condition):
        seen["x"], seen["t"] = x_s, at
        return eps

    velocity, _ = as_flow(memoryless(network), chain).predict(FLOW.noise(x0, eps, t), t, None, None)
    np.testing.assert_array_equal(seen["t"], s)
    np.testing.assert_allclose(seen["x"], chain.noise(x0, eps, jnp.asarray(s)), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(velocity, eps - x0, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sampler", [DDIMSampler(eta=0.5), DDPMSampler()])
def test_pairs_need_a_sampler_without_noise(sampler):
    with pytest.raises(UsageError, match="without noise of its own"):
        check_deterministic(sampler)
    check_deterministic(DDIMSampler())
