"""Spikes in gradients and losses: what stands out is clipped or left out, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.errors import UsageError
from effjax.train.durations import Budget
from effjax.train.loop import fit
from effjax.train.optimizers import AdamW
from effjax.train.stability import EPSILON, Spikes, clip_spikes, counts, skip_spikes
from tests.train.toy import Memory, Recorder, no_weights, program_of

BUDGET = Budget(total_steps=10, batch_size=1)
SPIKES = Spikes(score=2.0, decay=0.9, warmup=5)


def by_hand(numbers, clip):
    """Which numbers stand out, and what is kept of each, in float64."""
    mean, variance, out, kept = 0.0, 0.0, [], []
    for i, x in enumerate(numbers):
        z = (x - mean) / (np.sqrt(variance) + EPSILON) if i >= SPIKES.warmup else 0.0
        out.append(z > SPIKES.score)
        if out[-1] and clip:
            x = mean + SPIKES.score**2 * np.sqrt(variance) / z
        kept.append(x)
        if out[-1] and not clip:
            continue
        if i < SPIKES.warmup:
            mean, variance = np.mean(kept), np.var(kept)
        else:
            mean = SPIKES.decay * mean + (1 - SPIKES.decay) * x
            variance = SPIKES.decay * variance + (1 - SPIKES.decay) * (x - mean) ** 2
    return np.array(out), np.array(kept)


@pytest.fixture
def numbers(draw):
    x = 1 + 0.1 * draw.random(24)
    x[[9, 15, 16]] = 4.0, 2.0, 50.0
    return x


def test_a_gradient_that_stands_out_is_clipped_to_the_usual(numbers):
    clip = clip_spikes(SPIKES)
    update = jax.jit(clip.update)
    state = clip.init({})
    out, kept = by_hand(numbers, clip=True)
    assert out.sum() >= 3
    for norm, wanted in zip(numbers, kept, strict=True):
        gradient = {"a": jnp.array([0.6, 0.0]) * norm, "b": jnp.array(-0.8 * norm)}
        found, state = update(gradient, state)
        np.testing.assert_allclose(optax.tree.norm(found), wanted, rtol=1e-4)
        np.testing.assert_allclose(found["b"], -0.8 * wanted, rtol=1e-4)
    assert counts((optax.EmptyState(), state)) == {"clipped_steps": out.sum()}


def test_a_step_that_stands_out_is_left_out(numbers):
    inner = optax.adam(0.1)
    optimiser = skip_spikes(inner, SPIKES)
    update, plain = jax.jit(optimiser.update), jax.jit(inner.update)
    params = {"w": jnp.ones(3)}
    state, other = optimiser.init(params), inner.init(params)
    out, _ = by_hand(numbers, clip=False)
    assert out.sum() == 3
    for number, (loss, left_out) in enumerate(zip(numbers, out, strict=True)):
        gradient = {"w": jnp.arange(3.0) * number}
        found, state = update(gradient, state, params, value=jnp.asarray(loss, jnp.float32))
        if left_out:
            np.testing.assert_array_equal(found["w"], 0)
        else:
            wanted, other = plain(gradient, other, params)
            np.testing.assert_allclose(found["w"], wanted["w"], rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state.inner, other)
    assert counts(state) == {"skipped_steps": 3}


def test_what_is_no_number_is_not_left_out():
    """The step then halts, as it does otherwise."""
    optimiser = skip_spikes(optax.sgd(1.0), SPIKES)
    state, params = optimiser.init({"w": jnp.ones(1)}), {"w": jnp.ones(1)}
    for _ in range(6):
        _, state = optimiser.update(params, state, params, value=jnp.ones(()))
    found, state = optimiser.update(params, state, params, value=jnp.array(jnp.nan))
    np.testing.assert_array_equal(found["w"], -1)
    assert counts(state) == {"skipped_steps": 0}


def test_both_stand_in_a_chain_that_freezes():
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    made = AdamW(lr=0.1, clip=1.0, clip_spikes=SPIKES, skip_spikes=SPIKES, freeze=("b",))
    optimiser = made.transformation(params, BUDGET)
    state = optimiser.init(params)
    assert set(counts(state)) == {"clipped_steps", "skipped_steps"}
    found, _ = optimiser.update(params, state, params, value=jnp.ones(()))
    assert float(jnp.abs(found["a"]).min()) > 0
    np.testing.assert_array_equal(found["b"], 0)
    assert counts(AdamW(lr=0.1).transformation(params, BUDGET).init(params)) == {}


def test_a_run_counts_what_it_left_out():
    """Here every loss above the mean stands out; parameters then stay as they are."""
    spikes = dict(score=1e-3, warmup=2)
    program = program_of(
        "vision", train__steps="8 steps", train__log_every="1 steps", optimizer__skip_spikes=spikes
    )
    recorder = Recorder()
    fit(
        program,
        program.init(),
        checkpoints=Memory(),
        observer=recorder,
        stop_requested=lambda: False,
        read=no_weights,
    )
    rows = [values for _, split, values in recorder.written if split == "train"]
    skipped = np.array([row["skipped_steps"] for row in rows])
    left_out = np.diff(skipped) > 0
    still = np.array([row["update_norm"] == 0 for row in rows])
    assert 0 < left_out.sum() < len(left_out)
    np.testing.assert_array_equal(still[1:], left_out)  # of the first step the learning rate is 0


@pytest.mark.parametrize("wrong", [dict(score=0.0), dict(decay=1.0), dict(warmup=1)])
def test_what_is_no_spike_is_said(wrong):
    with pytest.raises(UsageError, match=f"{next(iter(wrong))}="):
        Spikes(**wrong)
