"""Routers learn plans: the loss, what learns, and a run from search to routers."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.errors import UsageError
from effjax.experiment import resolve
from effjax.train.tasks.layer_routing import effective_weights, focal_loss, prompt_read, solved
from tests.train.toy import losses, program_of

CONFIG = "configs.language.dr_llm"
KEY = jax.random.key(3)


def test_focal_loss_is_its_formula(draw):
    logits, labels = draw.normal(size=(4, 5, 3)) * 3, draw.integers(0, 3, (4, 5))
    weights = np.array([1.7, 0.1, 1.2])
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.take_along_axis(p, labels[..., None], -1)[..., 0]
    for gamma in (0.0, 2.0):
        found = focal_loss(jnp.float32(logits), jnp.asarray(labels), jnp.float32(weights), gamma)
        expected = -weights[labels] * (1 - chosen) ** gamma * np.log(chosen)
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-6)


def test_weights_are_those_of_effective_numbers():
    """The counts are those of the authors' labels for a model of 28 layers."""
    counts = np.array([4399.0, 120956.0, 1457.0])
    raw = (1 - 0.999) / (1 - 0.999**counts)
    found = effective_weights(jnp.float32(counts), 0.999)
    np.testing.assert_allclose(found, raw / raw.sum() * 3, rtol=1e-4)
    np.testing.assert_allclose(effective_weights(jnp.float32(counts), 0.0), 1.0, rtol=1e-6)
    inverse = effective_weights(jnp.float32(counts), 1.0)
    np.testing.assert_allclose(inverse * counts, np.full(3, inverse[0] * counts[0]), rtol=1e-5)
    rare = effective_weights(jnp.array([0.0, 10.0, 10.0]), 0.999)
    np.testing.assert_allclose(rare, [0.0, 1.0, 1.0], rtol=1e-6)
    np.testing.assert_array_equal(effective_weights(jnp.zeros(3), 0.999), 0.0)


def test_routers_read_the_prompt_but_for_its_last_token():
    weights = jnp.array([[0.0, 0, 0, 1, 0, 1], [1.0, 1, 1, 1, 1, 1], [0.0, 0, 0, 0, 0, 1]])
    assert prompt_read(weights).tolist() == [3, 6, 5]


def test_a_sequence_is_solved_by_all_its_answers():
    logits = jax.nn.one_hot(jnp.array([[1, 2, 3], [1, 2, 3], [1, 2, 3]]), 5)
    batch = {
        "targets": jnp.array([[0, 2, 3], [1, 2, 0], [0, 0, 0]]),
        "weights": jnp.array([[0.0, 1, 1], [0.0, 1, 1], [0.0, 0, 0]]),
    }
    assert solved(logits, batch).tolist() == [True, False, True]


def recipe(**task):
    config = importlib.import_module(CONFIG).get_config("smoke")
    config.task.update(task)
    return config


def batch_of(experiment, count=6):
    reader = experiment.data.source.open()
    rows = [reader[i] for i in range(count)]
    return {name: jnp.asarray(np.stack([row[name] for row in rows])) for name in rows[0]}


@pytest.fixture(scope="module")
def held():
    """A task and weights that say something."""
    experiment = resolve(recipe())
    batch = batch_of(experiment)
    shapes = meta.unbox(jax.eval_shape(experiment.task.init, KEY, batch))
    draw = np.random.default_rng(4)
    variables = jax.tree.map(lambda s: jnp.float32(0.3 * draw.normal(size=s.shape)), shapes)
    return experiment.task, dict(variables), batch


def test_only_routers_learn_and_of_the_given_plans(held):
    task, variables, batch = held
    counts = jnp.asarray(np.random.default_rng(0).integers(0, 3, (6, 3)))
    batch = {**batch, "counts": counts, "labels": jnp.tile(jnp.array([5, 50, 2]), (6, 1))}

    def loss(params):
        means, rest = task.loss({"params": params}, batch, KEY)
        return means["loss"].value(), (means, rest)

    (found, (means, rest)), slopes = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    assert rest == {}
    routers = slopes["blocks"].pop("router")
    assert all(np.any(leaf) for leaf in jax.tree.leaves(routers))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(slopes))
    reads = prompt_read(batch["weights"])
    told = batch["tokens"], counts, reads, batch["positions"], batch["segments"]
    _, route = jax.jit(lambda v: task.model.apply(v, *told, method="along"))(variables)
    said = np.asarray(route.logits, np.float64).swapaxes(0, 1)
    p = np.exp(said) / np.exp(said).sum(-1, keepdims=True)
    chosen = np.take_along_axis(p, np.asarray(counts)[..., None], -1)[..., 0]
    raw = 0.001 / (1 - 0.999 ** np.array([5, 50, 2]))
    alpha = (raw / raw.sum() * 3)[np.asarray(counts)]
    np.testing.assert_allclose(found, np.mean(-alpha * (1 - chosen) ** 2 * np.log(chosen)), rtol=1e-3)
    right = said.argmax(-1) == np.asarray(counts)
    np.testing.assert_allclose(means["agreement"].value(), right.mean(), rtol=1e-6)
    np.testing.assert_allclose(means["skips_found"].value(), right[np.asarray(counts) == 0].mean(), rtol=1e-6)


def test_in_evaluation_routers_decide(held):
    task, variables, batch = held
    means = jax.jit(task.metrics)(variables, {**batch, "mask": jnp.ones(6)})
    told = batch["tokens"], None, prompt_read(batch["weights"]), batch["positions"], batch["segments"]
    logits, route = jax.jit(lambda v: task.model.apply(v, *told, method="along"))(variables)
    np.testing.assert_allclose(means["layers"].value(), np.asarray(route.counts).sum(0).mean(), rtol=1e-6)
    np.testing.assert_allclose(means["solved"].value(), np.asarray(solved(logits, batch)).mean(), rtol=1e-6)
    assert 0 < means["layers"].value() < 6


def test_drawn_plans_are_right_and_short(held):
    task, variables, batch = held
    task, model = dataclasses.replace(task, candidates=12), task.model
    # Every plan is right where nothing is asked, and none where what is asked is never said.
    for asked, expected in ((0.0, True), (1.0, False)):
        told = {**batch, "weights": jnp.full((6, 24), asked), "targets": jnp.full((6, 24), -1)}
        counts, known = jax.jit(task._drawn)(variables, told, KEY)
        assert known.tolist() == [expected] * 6
        assert counts.shape == (6, model.depth)
    shortest = jax.jit(task._drawn)(variables, {**batch, "weights": jnp.zeros((6, 24))}, KEY)[0]
    assert shortest.sum(1).max() < model.depth


@pytest.mark.slow
def test_a_toy_runs():
    assert np.all(np.isfinite(losses(program_of(CONFIG))))


def test_bad_requests_are_named(held):
    _, variables, batch = held
    with pytest.raises(UsageError, match="no field 'counts'"):
        resolve(recipe(candidates=0)).task.loss(variables, batch, KEY)
    for fields, message in (
        ({"gamma": -1.0}, "gamma=-1"),
        ({"beta": 1.5}, "beta="),
        ({"z_loss": 0.1}, "z_loss"),
    ):
        with pytest.raises(UsageError, match=message):
            resolve(recipe(**fields))
