"""Tuning of rows through the training program and the driver: what moves, what is kept, what is chosen."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from configs.language import lm, s2ft
from effjax.compress.storage.trees import leaves_of
from effjax.errors import UsageError
from effjax.experiment import resolve
from effjax.train.step import loss_and_gradient
from experiments.run.restore import load_run, load_state
from tests.experiments.driver import drive, metric_rows
from tests.train.toy import program_of

KEY = jax.random.key(3)
CONTRACT = ("blocks", "ffn", "contract", "kernel")


@pytest.fixture(scope="module")
def program():
    return program_of("configs.language.s2ft")


@pytest.fixture(scope="module")
def batch(program):
    with contextlib.closing(program.data.train()) as rows:
        return jax.device_put(next(rows), program.batch_sharding)


def at(tree, path=CONTRACT):
    for name in path:
        tree = tree[name]
    return tree


def held_bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree) if leaf.ndim)


def test_training_moves_the_chosen_rows_alone(program, batch):
    first = program.init()
    before = leaves_of(jax.device_get(program.variables(first, ema=False)["params"]))
    state = program.init()
    for _ in range(3):
        state, metrics = program.step(state, batch)
    variables = program.variables(state, ema=False)
    assert set(variables) == {"params"}
    after = leaves_of(jax.device_get(variables["params"]))
    assert after.keys() == before.keys()
    moved = {path for path in before if np.any(after[path] != before[path])}
    assert moved == {"blocks/mixer/output/kernel", "blocks/ffn/contract/kernel"}
    for path in moved:
        apart = (after[path] - before[path]).reshape(len(after[path]), -1, after[path].shape[-1])
        found = [np.flatnonzero(matrix.any(-1)).tolist() for matrix in apart]
        assert found == np.asarray(at(state.collections["rows"], path.split("/"))).tolist()
    assert metrics["gradient_norm"] > 0


def test_moments_and_gradients_are_those_of_the_rows(program, batch):
    full = program_of("language")
    trained = sum(leaf.size for leaf in jax.tree.leaves(program.shapes.params["changes"]))
    everything = sum(leaf.size for leaf in jax.tree.leaves(full.shapes.params))
    share = held_bytes(program.shapes.opt_state) / held_bytes(full.shapes.opt_state)
    assert share == pytest.approx(trained / everything, rel=1e-6)
    assert held_bytes(program.shapes.opt_state) == 2 * 4 * trained
    state = program.init()
    slopes = jax.jit(lambda s: loss_and_gradient(program.task, s, batch, program.precision, 1)[1])(state)
    for path, leaf in leaves_of(slopes).items():
        assert bool(jnp.any(leaf != 0)) == path.startswith("changes/"), path


def test_the_loss_is_that_of_the_merged_model(program, batch):
    task = program.task
    held = program.init()
    draw = np.random.default_rng(0)
    changes = jax.tree.map(
        lambda leaf: jnp.asarray(draw.normal(size=leaf.shape), jnp.float32), held.params["changes"]
    )
    variables = {"params": {**held.params, "changes": changes}, **held.collections}
    means, others = jax.jit(task.loss)(variables, batch, KEY)
    assert set(others) == {"rows"}
    rows = {"mask": jnp.ones(len(batch["tokens"]))}
    metrics = jax.jit(lambda held: task.metrics({"params": held["params"]}, batch | rows)["loss"].value())
    assert float(metrics(task.tuned(variables))) == pytest.approx(float(means["loss"].value()), rel=1e-5)
    still = {"params": held.params, **held.collections}
    assert abs(metrics(task.tuned(variables)) - metrics(task.tuned(still))) > 1e-3


@pytest.mark.parametrize("worth", ["weight", "activation", "gradient"])
def test_rows_are_those_of_the_largest_or_smallest_norm(program, batch, worth):
    config = s2ft.get_config("smoke")
    config.task.update(dict(worth=worth, batches=2))
    largest = resolve(config).task
    config.task.smallest = True
    smallest = resolve(config).task
    held = program.init()
    params = {name: leaf for name, leaf in held.params.items() if name != "changes"}
    # A channel of the second layer has values 30 times as large and weights as much smaller, or the other way
    # round: the same function.
    ffn, factor = params["blocks"]["ffn"], 1 / 30 if worth == "weight" else 30.0
    params["blocks"]["ffn"] = {
        **ffn,
        "expand": {"kernel": ffn["expand"]["kernel"].at[1, :, 5].multiply(factor)},
        "contract": {"kernel": ffn["contract"]["kernel"].at[1, 5].divide(factor)},
    }
    batches = lambda: iter([batch, batch, batch])
    most, least = (task.measure({"params": params}, batches)["rows"] for task in (largest, smallest))
    assert 5 in at(most)[1].tolist()
    assert 5 not in at(least)[1].tolist()
    assert not set(at(most)[0].tolist()) & set(at(least)[0].tolist())
    assert at(most).shape == at(held.collections["rows"]).shape


def test_bad_requests_are_named():
    config = s2ft.get_config("smoke")
    config.task.update(dict(worth="weight"))
    with pytest.raises(UsageError, match=r"config\.train\.start"):
        resolve(config).task.measure({}, lambda: iter(()))
    config.task.update(dict(worth="random", smallest=True))
    with pytest.raises(UsageError, match="smallest has no meaning"):
        resolve(config)


@pytest.mark.slow
def test_a_step_takes_less_memory_than_that_of_all_numbers(program):
    # Batches large beside the toy's weights, as those of real runs are beside theirs.
    used = {}
    for name, family in (("rows", "configs.language.s2ft"), ("all", "language")):
        made = program_of(family, data__batch_size=64).step.memory_analysis()
        used[name] = made.argument_size_in_bytes + made.temp_size_in_bytes
    assert used["rows"] < 0.8 * used["all"]


@pytest.mark.slow
def test_a_trained_model_is_tuned_through_the_driver(tmp_path):
    drive("train", "--config=configs/language/lm.py:smoke", f"--workdir={tmp_path}/lm")
    drive(
        *("train", "--config=configs/language/s2ft.py:smoke", f"--config.train.start={tmp_path}/lm"),
        *(f"--workdir={tmp_path}/s2ft", "--config.task.worth=activation", "--config.train.steps=40 steps"),
    )
    _, dense = load_run(tmp_path / "lm")
    _, state = load_state(tmp_path / "s2ft")
    own = {name: leaf for name, leaf in state.params.items() if name != "changes"}
    jax.tree.map(np.testing.assert_array_equal, own, dense["params"])
    _, used = load_run(tmp_path / "s2ft")
    assert jax.tree.structure(meta.unbox(used["params"])) == jax.tree.structure(dense["params"])
    assert np.any(at(used["params"]) != at(dense["params"]))
    losses = [row["loss"] for row in metric_rows(tmp_path / "s2ft") if row["split"] == "test"]
    assert losses[-1] < losses[0]
    drive("generate", f"--workdir={tmp_path}/s2ft", "--prompt=a", "--max_new=4")


def test_both_configs_tune_as_many_numbers():
    assert lm.SIZES["pydocs"].hidden == 512
    counts = {}
    for variant, top in (("pydocs", "changes"), ("pydocs-lora", "adapters")):
        task = resolve(s2ft.get_config(variant)).task
        tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
        batch = dict(tokens=tokens, positions=tokens, segments=tokens)
        made = meta.unbox(jax.eval_shape(task.init, KEY, batch))["params"][top]
        counts[variant] = sum(leaf.size for leaf in jax.tree.leaves(made))
    assert counts == {"pydocs": 88_320, "pydocs-lora": 88_064}
