import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress.recovery import Recovery, apart, recovered, watched
from effjax.compress.steps.prune import Prune
from effjax.compress.steps.recover import Recover
from effjax.compress.steps.round import Round
from effjax.compress.structure.cost import macs
from effjax.compress.structure.layers import put_together, take_apart
from effjax.compress.structure.scores import Magnitude
from effjax.compress.structure.units import keep
from effjax.compress.subject import Calibration
from effjax.errors import UsageError
from tests.compress import tiny
from tests.compress.structure.networks import subject


def calibration(network, told=None):
    batches = lambda: iter([network.example] * 50)
    return Calibration(
        batches, jax.random.key(0), (lambda said: None) if told is None else told.append, network
    )


def test_a_network_learns_from_the_one_it_was_made_from():
    whole = subject("lm")
    layers = take_apart(whole)
    small = put_together(whole, [keep(layers[0], "hidden", range(20)), *layers[1:]])

    _, goal = jax.jit(lambda v: watched(whole, v, tiny.BATCH, jax.random.key(0)))(whole.variables)

    @jax.jit
    def far(variables):
        _, output = watched(small, variables, tiny.BATCH, jax.random.key(0))
        return apart(whole, output, goal, 1.0, None)

    told = []
    after = recovered(small, whole, calibration(whole, told), Recovery(steps=12, lr=2e-3, share=1.0))
    assert far(after.variables) < far(small.variables)
    np.testing.assert_allclose(apart(whole, goal, goal, 1.0, None), 0, atol=1e-6)
    assert [said.split(":")[0] for said in told] == [f"step {n} of 12" for n in (3, 6, 9, 12)]
    assert after.model == small.model


def test_a_denoiser_is_taught_by_its_prediction():
    network = subject("dit")
    batch = network.task.prepare(network.example, jax.random.key(1))
    watch = jax.jit(lambda v: watched(network, v, batch, jax.random.key(0)))
    noised = jax.tree.map(
        lambda leaf: leaf + 0.1 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), network.params
    )
    (_, goal), (_, output) = watch(network.variables), watch({**network.variables, "params": noised})
    assert output.shape[:-1] == network.example["image"].shape[:-1]
    np.testing.assert_allclose(
        apart(network, output, goal, 3.0, None),
        np.mean((np.asarray(output) - np.asarray(goal)) ** 2),
        rtol=1e-5,
    )

    told = []
    apart_before = recovered(
        network.with_params(noised), network, calibration(network, told), Recovery(steps=5, lr=0.0, share=1.0)
    )
    jax.tree.map(np.testing.assert_array_equal, apart_before.params, noised)
    assert [said.split(":")[0] for said in told] == ["step 2 of 5", "step 4 of 5", "step 5 of 5"]


def test_rounds_of_pruning_meet_the_budget_and_train_in_between():
    network = subject("vit")
    told = []
    step = Prune(0.5, score=Magnitude(), rounds=2, tune=Recovery(steps=1))
    small = step.apply(network, calibration(network, told))
    assert macs(small) <= 0.5 * macs(network)
    assert [said for said in told if said.startswith("step")] == [told[1]]
    again = Recover(Recovery(steps=1)).apply(small, calibration(network))
    assert again.model == small.model


def test_what_cannot_be_trained_is_named():
    network = tiny.language()
    codes = Round(kernels=("blocks/ffn/.*",), layout=dataclasses.replace(Round().layout, group=8)).apply(
        network, calibration(network)
    )
    with pytest.raises(UsageError, match="codes do not train"):
        recovered(codes, None, calibration(network), Recovery(steps=1))
    nan = network.with_params(jax.tree.map(lambda leaf: leaf * jnp.nan, network.params))
    with pytest.raises(UsageError, match="lower lr"):
        recovered(nan, None, calibration(network), Recovery(steps=1))
    with pytest.raises(UsageError, match="share=2"):
        Recovery(share=2.0)
    with pytest.raises(UsageError, match="left=0"):
        Prune(left=0.0)
