"""Configs of language models with experts: published sizes, equal work, a run that carries its bias."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from configs.language import moe
from effjax.experiment import resolve
from effjax.train.loop import fit
from experiments.run.cost import task_cost
from tests.train.toy import Memory, Recorder, no_weights, program_of


def cost_of(variant):
    experiment = resolve(moe.get_config(variant))
    data = experiment.data.described()
    batch = jax.tree.map(jnp.asarray, dict(data.example_batch(1)))
    variables = meta.unbox(jax.eval_shape(experiment.task.init, jax.random.key(0), batch))
    return task_cost(experiment.task, data, variables)


def test_the_twins_do_as_much_for_a_token():
    sparse, dense = cost_of("pydocs"), cost_of("pydocs-dense")
    tokens, routers = 256, 4 * 192 * 8
    assert sparse.macs == dense.macs + tokens * routers
    assert sparse.macs < 1.004 * dense.macs
    assert sparse.parameters == dense.parameters + 4 * (3 * 192 * (8 * 256 - 512)) + routers
    assert not sparse.unknown


@pytest.mark.parametrize(
    ("variant", "parameters"), [("mixtral-8x7b", 46_702_792_704), ("olmoe-1b-7b", 6_919_161_856)]
)
def test_published_parameter_counts(variant, parameters):
    model = resolve(moe.get_config(variant)).model
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 8), jnp.int32))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters


@pytest.mark.slow
def test_the_loop_carries_the_bias_in_full_precision():
    changes = {"model__block__ffn__balance_rate": 0.125, "train__precision": dict(compute="bfloat16")}
    program = program_of(
        "configs.language.moe", train__steps="4 steps", train__log_every="1 steps", evaluators={}, **changes
    )
    recorder, checkpoints = Recorder(), Memory()
    fit(
        program,
        program.init(),
        checkpoints=checkpoints,
        observer=recorder,
        stop_requested=lambda: False,
        read=no_weights,
    )
    values = recorder.written[-1][2]
    assert values["loss"] == pytest.approx(values["cross_entropy"] + values["load_balance"], rel=1e-5)
    state = checkpoints.saved[4][0]
    bias = state.collections["routing"]["blocks"]["ffn"]["bias"]
    assert bias.dtype == jnp.float32
    assert bias.shape == (2, 4)
    steps = np.asarray(bias) / 0.125
    np.testing.assert_array_equal(steps, np.round(steps))
    assert 0 < np.abs(steps).max() <= 4
