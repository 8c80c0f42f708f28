"""What is given stays as it is at every step, and the network sees it clean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.diffusion.ddpm import DDPM
from effjax.diffusion.denoiser import Denoiser, memoryless
from effjax.diffusion.examples import example_keys
from effjax.diffusion.guidance import guided
from effjax.diffusion.known import Known, given
from effjax.diffusion.rectified_flow import RectifiedFlow
from effjax.diffusion.samplers import (
    DDIMSampler,
    DDPMSampler,
    DPMSolverSampler,
    EulerSampler,
    HeunSampler,
    sample,
    walk,
)

SHAPE = (4, 3, 3, 2)
CHAIN, LEARNED, FLOW = DDPM(sigma="small", prediction="v"), DDPM(), RectifiedFlow()


def what_is_given(seed=0):
    draw = np.random.default_rng(seed)
    content = jnp.asarray(draw.uniform(-1, 1, (2, *SHAPE)), jnp.float32)
    return Known(content, jnp.asarray(draw.random((2, *SHAPE[:3], 1)) < 0.5))


def network(process, checked=None):
    """Reads everything; where `checked`, gives NaN unless what is given is there, clean."""

    def predict(x_t, t, label):
        mean = jnp.tanh(jnp.mean(x_t, axis=(1, 2, 3), keepdims=True) - 0.3 * x_t)
        if checked is not None:
            there = jnp.all(jnp.where(checked.where, x_t == checked.content, True))
            mean = jnp.where(there, mean, jnp.nan)
        return jnp.concatenate([mean, jnp.zeros_like(mean)], -1) if process.learned_sigma else mean

    return memoryless(predict)


def walked(sampler, process, known, denoiser=None):
    keys = example_keys(jax.random.key(4), jnp.arange(2))
    label = jnp.zeros(2, jnp.int32)
    denoiser = denoiser or network(process, known)

    @jax.jit
    def run(known):
        keep = lambda state: (state.x, state.x0)
        return walk(sampler, denoiser, process, label, SHAPE, keys, keep, known)

    return run(known)


@pytest.mark.parametrize(
    ("sampler", "process"),
    [
        (DDPMSampler(5), LEARNED),
        (DDIMSampler(5, eta=0.5), CHAIN),
        (DPMSolverSampler(5), CHAIN),
        (DPMSolverSampler(5), FLOW),
        (EulerSampler(5), FLOW),
        (HeunSampler(5), FLOW),
    ],
)
def test_what_is_given_passes_through_every_step(sampler, process):
    known = what_is_given()
    state, steps = walked(sampler, process, known)
    assert np.all(np.isfinite(state.x))
    for seen in (*steps, state.x[None], state.x0[None]):
        expected = jnp.broadcast_to(known.content[None], seen.shape)
        where = np.broadcast_to(known.where[None], seen.shape)
        np.testing.assert_array_equal(np.asarray(seen)[where], np.asarray(expected)[where])
    assert np.all(np.asarray(state.x != known.content)[np.broadcast_to(~known.where, state.x.shape)])


def test_all_given_is_the_content_and_nothing_given_is_the_sampler_itself():
    """Verify (c), in sampling."""
    known = what_is_given()
    everything = Known(known.content, jnp.ones_like(known.where))
    state, _ = walked(EulerSampler(3), FLOW, everything)
    np.testing.assert_array_equal(state.x, known.content)
    nothing = Known(known.content, jnp.zeros_like(known.where))
    free = network(FLOW)
    state, _ = walked(EulerSampler(3), FLOW, nothing, free)
    keys = example_keys(jax.random.key(4), jnp.arange(2))
    plain = jax.jit(lambda: sample(EulerSampler(3), free, FLOW, jnp.zeros(2, jnp.int32), SHAPE, keys))()
    np.testing.assert_array_equal(state.x, plain)


def test_what_is_not_given_of_the_content_has_no_effect():
    known = what_is_given()
    other = Known(jnp.where(known.where, known.content, jnp.nan), known.where)
    free = network(FLOW)
    first, second = (walked(EulerSampler(3), FLOW, each, free)[0].x for each in (known, other))
    np.testing.assert_array_equal(first, second)
    moved = Known(known.content + 0.5, known.where)
    assert np.any(np.where(known.where, 0, walked(EulerSampler(3), FLOW, moved, free)[0].x - first))


def test_guided_denoisers_are_wrapped_from_outside():
    known = what_is_given()
    seen = network(FLOW, Known(jnp.repeat(known.content, 2, 0), jnp.repeat(known.where, 2, 0)))
    denoiser = guided(seen, 2.0, lambda label: label)
    state, _ = walked(HeunSampler(3), FLOW, known, denoiser)
    assert np.all(np.isfinite(state.x))


def test_memory_starts_from_what_is_given_too():
    known = what_is_given()
    denoiser = Denoiser(lambda x, t, condition, memory: (x, memory), lambda x, t, condition: x)
    x = jnp.full((2, *SHAPE), 7.0)
    start = given(denoiser, known).start(x, jnp.ones(2), None)
    np.testing.assert_array_equal(start, jnp.where(known.where, known.content, 7.0))
