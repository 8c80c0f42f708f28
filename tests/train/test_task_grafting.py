"""The first stage of grafting as a task, and a run through both stages."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from configs.diffusion import dit as dit_configs
from configs.diffusion import grafting
from effjax.compress.grafting import graft
from effjax.errors import UsageError
from effjax.experiment import resolve
from effjax.train.checkpoint import Checkpoints
from effjax.train.loop import fit
from effjax.train.program import build_program
from effjax.train.tasks import served
from effjax.train.tasks.mean import values
from experiments.run.training import first_state
from tests.train.toy import Memory, Recorder, no_weights

KEY = jax.random.key(3)


def recipe(name="hyena-x-50", **changes):
    """The smallest run in which a graft is taught."""
    config = dit_configs.get_config("smoke")
    teacher = config.model
    config.model = grafting.grafted(teacher, name)
    config.task = dict(config.task.to_dict(), kind="grafting", teacher=teacher, **changes)
    config.optimizer.freeze = (grafting.old(name),) if name != "parallel" else ()
    config.evaluators, config.train.log_every = {}, "1 steps"
    return config


def program_of(config):
    experiment = resolve(config)
    return build_program(experiment, experiment.data.open(), jax.devices()[:1])


def batch_of(task, count=4):
    x = np.random.default_rng(0).normal(size=(count, 8, 8, 1))
    return {"image": jnp.float32(x), "label": jnp.arange(count), "mask": jnp.ones(count)}


@pytest.mark.slow
def test_only_new_operators_learn_and_only_from_the_teacher():
    task = resolve(recipe()).task
    batch = batch_of(task)
    held = meta.unbox(jax.jit(task.init)(KEY, batch))
    prepared = task.prepare(batch, KEY)

    def loss(params, teacher):
        means, _ = task.loss({"params": params, "teacher": teacher}, prepared, KEY)
        return means["loss"].value()

    slopes = jax.jit(jax.grad(loss, (0, 1)))(held["params"], held["teacher"])
    moved = {
        "/".join(str(key.key) for key in path[1:4])
        for path, leaf in jax.tree_util.tree_leaves_with_path(slopes)
        if jnp.any(leaf)
    }
    assert moved == {"blocks/members_1/mixer"}
    assert set(served(task, held)) == {"params"}
    # What the graft computes elsewhere is not asked.
    other = jax.tree.map(lambda leaf: leaf + 1, held["params"])
    other["blocks"]["members_1"]["mixer"] = held["params"]["blocks"]["members_1"]["mixer"]
    assert loss(other, held["teacher"]) == loss(held["params"], held["teacher"])


@pytest.mark.slow
def test_a_run_is_taught_and_then_tuned(tmp_path):
    config = recipe()
    config.optimizer.lr = 1e-2
    with pytest.raises(UsageError, match=r"config\.task\.weights is missing"):
        first_state(program_of(config))
    teacher = dit_configs.get_config("smoke")
    teacher.evaluators = {}
    first = program_of(teacher)
    draw = np.random.default_rng(0)
    start = first.init()
    params = jax.tree.map(lambda x: jnp.float32(x + 0.2 * draw.normal(size=x.shape)), start.params)
    (tmp_path / "config.json").write_text(json.dumps({"config": teacher.to_dict()}))
    with contextlib.closing(Checkpoints(tmp_path / "checkpoints")) as saved:
        saved.save(0, start.replace(params=params, ema=params), {})
    config.task.weights = str(tmp_path)
    program = program_of(config)
    state = first_state(program)
    np.testing.assert_array_equal(
        state.params["blocks"]["members_1"]["ffn"]["expand"]["kernel"],
        params["blocks"]["ffn"]["expand"]["kernel"][1::2],
    )
    before = jax.tree.map(np.asarray, state.params)
    recorder, memory = Recorder(), Memory()
    fit(program, state, checkpoints=memory, observer=recorder, stop_requested=lambda: False, read=no_weights)
    last = memory.saved[max(memory.saved)][0].params
    for path, leaf in jax.tree_util.tree_leaves_with_path(last):
        same = np.array_equal(leaf, _at(before, path))
        assert same != ("members_1" in str(path) and "'mixer'" in str(path)), path
    losses = recorder.losses()
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    # The folder of this run is what the second stage starts from.
    folder = tmp_path / "taught"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"config": config.to_dict()}))
    with contextlib.closing(Checkpoints(folder / "checkpoints")) as saved:
        saved.save(20, memory.saved[max(memory.saved)][0], {})
    tuned = grafting.get_config("smoke")
    tuned.train.start, tuned.evaluators = str(folder), {}
    state = first_state(program_of(tuned))
    for got, wanted in zip(jax.tree.leaves(state.params), jax.tree.leaves(last), strict=True):
        assert got.shape == wanted.shape
    np.testing.assert_array_equal(
        state.params["embed"]["projection"]["kernel"], before["embed"]["projection"]["kernel"]
    )


def _at(tree, path):
    for key in path:
        tree = tree[key.key]
    return tree


@pytest.mark.slow
def test_pairs_of_blocks_are_taught_as_a_whole():
    task = resolve(recipe("parallel")).task
    batch = batch_of(task)
    held = meta.unbox(jax.jit(task.init)(KEY, batch))
    held["params"] = graft(task.model, task.teacher, held["teacher"]["params"], held["params"])
    means, _ = jax.jit(task.loss)(held, task.prepare(batch, KEY), KEY)
    assert set(means) == {"loss", "block_error"}
    # Blocks that are the identity, as DiT's are at first, are so side by side.
    np.testing.assert_allclose(values(means)["block_error"], 0, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["digits-self-100", "digits-hyena-x-50", "digits-mlp3-100", "digits-parallel"]
)
def test_what_is_frozen_is_what_is_old(name):
    config = grafting.get_config(name)
    experiment = resolve(config)
    shapes = meta.unbox(jax.eval_shape(experiment.task.init, KEY, batch_of(experiment.task)))["params"]
    explained = experiment.optimizer.explain(shapes)
    learns = {path for path, what in explained.items() if not what["frozen"]}
    kind = {"mlp3": "ffn"}.get(name.split("-")[1], "mixer")
    wanted = {
        path
        for path in explained
        if path.startswith("blocks/") and ("parallel" in name or f"/{kind}/" in path)
    }
    if "50" in name:
        wanted = {path for path in wanted if "members_1" in path}
    assert learns == wanted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.model.update(dim=16), "dim is 16 in the grafted network and 32"),
        (lambda config: setattr(config, "model", config.task.teacher), "the model is its teacher"),
        (lambda config: config.model.update(depth=2), "has 4 layers and its teacher 2"),
    ],
)
def test_grafts_that_do_not_fit(change, message):
    config = recipe()
    change(config)
    with pytest.raises(UsageError, match=message):
        resolve(config)
