"""Adapters through the training driver: what moves, what a run is used with, thresholds that are measured."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from configs.language import cats
from effjax.errors import UsageError
from effjax.experiment import resolve
from experiments.run.restore import load_run, load_state
from tests.experiments.driver import drive, metric_rows

KEY = jax.random.key(3)


def recipe(**task):
    config = cats.get_config("smoke")
    config.task.update(task)
    return config


def batch_of():
    tokens = jax.random.randint(KEY, (2, 16), 0, 256)
    where = jnp.broadcast_to(jnp.arange(16)[None], (2, 16))
    there = jnp.ones((2, 16), int)
    return dict(tokens=tokens, targets=tokens, positions=where, segments=there, weights=there * 1.0)


def test_the_loss_is_that_of_the_merged_model():
    task, batch = resolve(recipe()).task, batch_of()
    held = meta.unbox(jax.jit(task.init)(KEY, batch))
    own, thin = dict(held["params"]), held["params"]["adapters"]
    del own["adapters"]
    draw = np.random.default_rng(0)
    thin = jax.tree.map(
        lambda leaf: jnp.float32(0.1 * draw.normal(size=leaf.shape)), held["params"]["adapters"]
    )
    held = {**held, "params": {**own, "adapters": thin}}
    means, others = jax.jit(task.loss)(held, batch, KEY)
    assert set(others) == {"thresholds"}
    tuned = task.tuned(held)
    assert "adapters" not in tuned["params"]
    metrics = jax.jit(lambda held: task.metrics(held, batch | {"mask": jnp.ones(2)})["loss"].value())
    assert float(metrics(tuned)) == pytest.approx(float(means["loss"].value()), rel=1e-5)
    assert abs(metrics({**tuned, "params": own}) - metrics(tuned)) > 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: resolve(recipe(rank=0)), "rank=0"),
        (lambda: resolve(recipe(sparsity=0.5)).task.measure({}, lambda: iter(())), "config.train.start"),
    ],
)
def test_bad_requests_are_named(change, message):
    with pytest.raises(UsageError, match=message):
        change()


def test_sparsity_needs_perceptrons_with_thresholds():
    config = recipe(sparsity=0.5)
    config.model.block.ffn.kind = "gated"
    with pytest.raises(UsageError, match=r"ffn\.kind='cats'"):
        resolve(config)


@pytest.mark.slow
def test_a_trained_model_is_thresholded_and_tuned(tmp_path):
    drive("train", "--config=configs/language/lm.py:smoke", f"--workdir={tmp_path}/lm")
    drive(
        *("train", "--config=configs/language/cats.py:smoke", "--config.task.sparsity=0.5"),
        *(
            f"--config.train.start={tmp_path}/lm",
            f"--workdir={tmp_path}/cats",
            "--config.train.steps=40 steps",
        ),
    )
    _, dense = load_run(tmp_path / "lm")
    _, state = load_state(tmp_path / "cats")
    own = {name: leaf for name, leaf in state.params.items() if name != "adapters"}
    jax.tree.map(np.testing.assert_array_equal, own, dense["params"])
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(state.params["adapters"]))
    assert np.all(state.collections["thresholds"]["blocks"]["ffn"]["threshold"] > 0)
    _, used = load_run(tmp_path / "cats")
    assert jax.tree.structure(used["params"]) == jax.tree.structure(dense["params"])
    gates = [held["params"]["blocks"]["ffn"]["gate"]["kernel"] for held in (used, dense)]
    assert np.any(gates[0] != gates[1])
    losses = [row["loss"] for row in metric_rows(tmp_path / "cats") if row["split"] == "test"]
    assert losses[-1] < losses[0]
    drive("generate", f"--workdir={tmp_path}/cats", "--prompt=a", "--max_new=4")
