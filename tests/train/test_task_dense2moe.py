"""Distillation into experts and groups of blocks: what is compared, where it starts, a run through both."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from configs.diffusion import dense2moe
from configs.diffusion import dit as dit_configs
from effjax.compress.dense2moe import importance, magnitude
from effjax.errors import UsageError
from effjax.experiment import resolve
from tests.experiments.driver import drive, metric_rows

KEY = jax.random.key(3)


def recipe(stage="experts", **ffn):
    """The smallest run in which a DiT is made sparse."""
    config = dit_configs.get_config("smoke")
    dense = config.model
    sparse = dense2moe.with_experts(dense)
    sparse.block.ffn.update(ffn)
    groups = dense2moe.in_groups(sparse, 2, 1)
    config.model = dict(experts=sparse, blocks=groups, pruned=dense2moe.narrowed(dense))[stage]
    teacher = sparse if stage == "blocks" else dense
    config.task = dict(config.task.to_dict(), kind="dense2moe", teacher=teacher)
    config.evaluators = {}
    return config


def batch_of(count=4):
    x = np.random.default_rng(0).normal(size=(count, 8, 8, 1))
    return {"image": jnp.float32(x), "label": jnp.arange(count), "mask": jnp.ones(count)}


def held_by(task):
    """Variables whose teacher is drawn, because a fresh DiT says nothing, and whose student is made of it."""
    shapes = meta.unbox(jax.eval_shape(task.init, KEY, batch_of()))
    draw = np.random.default_rng(4)
    teacher = jax.tree.map(lambda s: jnp.float32(0.2 * draw.normal(size=s.shape)), shapes["teacher"])
    params = task.inherit(shapes["params"], {"teacher": teacher}, lambda: iter([batch_of()]))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes["params"])
    return {"params": params, "teacher": teacher}


def figures(task, held):
    means, _ = jax.jit(task.loss)(held, task.prepare(batch_of(), KEY), KEY)
    return {name: float(mean.value()) for name, mean in means.items()}


@pytest.mark.parametrize("stage", ["experts", "blocks"])
def test_with_all_on_nothing_is_left_to_learn(stage):
    config = recipe(stage, chosen=12, scale=12.0, balance=0.0)
    if stage == "blocks":
        config.model.block.update(chosen=2, balance=0.0)
    task = resolve(config).task
    held = held_by(task)
    if stage == "experts":
        ffn = held["params"]["blocks"]["ffn"]
        ffn["router"] = jax.tree.map(jnp.zeros_like, ffn["router"])
    found = figures(task, held)
    assert found["output_error"] < 1e-9
    assert found["feature_error"] < 1e-9
    assert found["loss"] < 1e-9


def test_only_the_sparse_network_learns_from_both_distances():
    task = resolve(recipe()).task
    held, batch = held_by(task), task.prepare(batch_of(), KEY)
    found = figures(task, held)
    assert found["output_error"] > 1e-6
    assert found["feature_error"] > 1e-6
    assert found["loss"] > found["output_error"] + found["feature_error"]  # and the balance

    def loss(params, teacher):
        return task.loss({"params": params, "teacher": teacher}, batch, KEY)[0]["loss"].value()

    own, others = jax.jit(jax.grad(loss, (0, 1)))(held["params"], held["teacher"])
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(others))
    ffn = own["blocks"]["ffn"]
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(ffn))


def test_neurons_are_ranked_on_training_batches():
    task = resolve(recipe()).task
    held = held_by(task)
    teacher = held["teacher"]["params"]
    scores = importance(task._dense_loss({"teacher": held["teacher"]}), teacher, [batch_of()])
    best = np.argsort(-np.asarray(scores[1]))[:32]
    shared = held["params"]["blocks"]["ffn"]["shared"]["expand"]["kernel"][1]
    np.testing.assert_array_equal(shared, teacher["blocks"]["ffn"]["expand"]["kernel"][1][:, best])


def test_pruned_neurons_are_the_largest():
    config = recipe("pruned")
    config.task.scores = "magnitude"
    task = resolve(config).task
    ffn = task.model.block.ffn
    experts = dense2moe.with_experts(config.task.teacher).block.ffn
    assert ffn.hidden == experts.shared + experts.chosen * experts.hidden
    held = held_by(task)
    kept, dense = held["params"]["blocks"]["ffn"], held["teacher"]["params"]
    teacher = dense["blocks"]["ffn"]
    best = np.argsort(-np.asarray(magnitude(dense)[1]))[: ffn.hidden]
    np.testing.assert_array_equal(kept["contract"]["kernel"][1], teacher["contract"]["kernel"][1][best])
    found = figures(task, held)
    assert found["output_error"] > 1e-6
    assert found["loss"] == pytest.approx(found["output_error"] + found["feature_error"])


def test_bad_requests_are_named():
    with pytest.raises(UsageError, match="the model has others"):
        resolve(recipe(hidden=9))
    config = recipe("blocks")
    config.model.depth = 2
    with pytest.raises(UsageError, match="2 groups of 2 blocks are not the teacher's 2"):
        resolve(config)
    config = recipe("pruned")
    config.model.block.ffn.activation = "relu"
    with pytest.raises(UsageError, match="it has none of them"):
        resolve(config)
    config = recipe()
    config.model = config.task.teacher
    with pytest.raises(UsageError, match="it has none of them"):
        resolve(config)


@pytest.mark.slow
def test_a_run_of_every_stage(tmp_path):
    drive("train", "--config=configs/diffusion/dit.py:smoke", f"--workdir={tmp_path}/dense")
    paths = {}
    for stage in ("experts", "blocks", "pruned"):
        config = recipe(stage)
        config.train.steps = "20 steps"
        config.task.weights = str(tmp_path / ("experts" if stage == "blocks" else "dense"))
        paths[stage] = tmp_path / f"{stage}.py"
        paths[stage].write_text(
            "import json\nfrom ml_collections import ConfigDict\n"
            f"def get_config():\n    return ConfigDict(json.loads({config.to_json()!r}))\n"
        )
        drive("train", f"--config={paths[stage]}", f"--workdir={tmp_path / stage}")
        rows = [row for row in metric_rows(tmp_path / stage) if row["split"] == "train"]
        assert rows[-1]["loss"] < rows[0]["loss"]
        assert json.dumps(rows[-1]).count("feature_error") == 1
    drive("sample", f"--workdir={tmp_path / 'blocks'}", f"--out={tmp_path / 'out.png'}", "--steps=3")
    assert (tmp_path / "out.png").stat().st_size > 0
