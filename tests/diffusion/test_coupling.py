import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.diffusion.coupling import as_flow, check_deterministic, straightness
from effjax.diffusion.ddpm import DDPM
from effjax.diffusion.denoiser import memoryless
from effjax.diffusion.examples import example_keys
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
