"""What a student learns of its teacher, and that nothing of the teaching is left in it."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.errors import UsageError
from effjax.experiment import resolve
from effjax.measure.cost import count
from effjax.tokens import Schedule, Slimming
from effjax.train.checkpoint import Checkpoints
from effjax.train.loop import fit
from effjax.train.program import build_program
from effjax.train.tasks import served
from effjax.train.tasks.distillation import Distillation, Recalibrations, distance, divergence
from effjax.train.tasks.mean import values
from experiments.run.cost import forward_cost
from experiments.run.training import first_state
from tests.tokens.tiny import images, vit
from tests.train.toy import Memory, Recorder, no_weights, smoke

STUDENT = vit(reduce=Schedule({2: Slimming(4)}))
BATCH = {"image": images(3), "label": jnp.array([0, 3, 1]), "mask": jnp.ones(3)}
TASK = Distillation(STUDENT, vit(), logits=2.0, temperature=3.0, tokens=0.5, smoothing=0.1)


@pytest.fixture(scope="module")
def held():
    """Variables of all three, with heads that say something."""
    made = meta.unbox(jax.jit(TASK.init)(jax.random.key(0), BATCH))
    for params in (made["params"], made["teacher"]["params"]):
        params["head"]["kernel"] = jax.random.normal(jax.random.key(1), params["head"]["kernel"].shape)
    return made


def test_divergence_is_kullback_leiblers():
    teacher, student = (np.random.RandomState(i).standard_normal((3, 5)) * 4 for i in (0, 1))
    for row, (a, b) in enumerate(zip(teacher / 3, student / 3, strict=True)):
        p, q = np.exp(a) / np.exp(a).sum(), np.exp(b) / np.exp(b).sum()
        wanted = 9 * sum(x * (np.log(x) - np.log(y)) for x, y in zip(p, q, strict=True))
        given = divergence(jnp.asarray(teacher, jnp.float32), jnp.asarray(student, jnp.float32), 3.0)[row]
        np.testing.assert_allclose(given, wanted, rtol=1e-4)


def test_the_loss_is_the_sum_of_its_parts(held):
    batch = TASK.prepare(BATCH, jax.random.key(2))
    means, collections = jax.jit(TASK.loss)(held, batch, jax.random.key(3))
    got = values(means)
    np.testing.assert_allclose(
        got["loss"], got["labels_loss"] + got["logits_loss"] + got["tokens_loss"], rtol=1e-6
    )
    student = STUDENT.apply(held, BATCH["image"])
    teacher = vit().apply(held["teacher"], BATCH["image"])
    np.testing.assert_allclose(got["logits_loss"], 2 * divergence(teacher, student, 3.0).mean(), rtol=1e-4)
    entropy = -jnp.sum(batch["target"] * jax.nn.log_softmax(student), axis=-1).mean()
    np.testing.assert_allclose(got["labels_loss"], entropy, rtol=1e-4)
    assert got["tokens_loss"] > 0
    jax.tree.map(np.testing.assert_array_equal, collections["teacher"], held["teacher"])


def test_only_slimmed_layers_are_recalibrated(held):
    assert set(held["params"]["recalibration"]) == {"layer_1", "layer_2", "layer_3"}  # behind layers 1, 2, 3
    one = jax.random.normal(jax.random.key(4), (2, 16, 8))
    np.testing.assert_array_equal(Recalibrations().apply({}, [one], 16)[0], one)
    same = distance([one, one], [one, one + 2])
    np.testing.assert_allclose(same, [2.0, 2.0], rtol=1e-6)


def test_a_student_that_is_its_teacher_loses_nothing_to_it(held):
    task = Distillation(vit(), vit(), labels=0.0, tokens=1.0)
    variables = {"params": held["teacher"]["params"], "teacher": held["teacher"]}
    means, _ = task.loss(variables, TASK.prepare(BATCH, jax.random.key(2)), jax.random.key(3))
    np.testing.assert_allclose(values(means)["loss"], 0.0, atol=1e-6)
    assert values(means)["agreement"] == 1


def test_the_teacher_learns_nothing_and_every_part_teaches_the_student(held):
    batch = TASK.prepare(BATCH, jax.random.key(2))

    def loss(variables, task):
        return task.loss(variables, batch, jax.random.key(3))[0]["loss"].total

    whole = jax.jit(jax.grad(lambda v: loss(v, TASK)))(held)
    assert not any(bool(jnp.any(g)) for g in jax.tree.leaves(whole["teacher"]))
    assert all(bool(jnp.any(g)) for g in jax.tree.leaves(whole["params"]["recalibration"]["layer_2"]))
    assert bool(jnp.any(whole["params"]["reduce_2"]["scores"]["kernel"]))


def test_nothing_of_it_is_left_in_inference(held):
    left = served(TASK, held)
    assert set(left) == {"params"}
    assert set(left["params"]) == set(
        meta.unbox(jax.eval_shape(STUDENT.init, jax.random.key(0), images()))["params"]
    )
    with_all = jax.jit(TASK.metrics)(held, BATCH)
    jax.tree.map(np.testing.assert_array_equal, with_all, jax.jit(TASK.metrics)(left, BATCH))
    alone = count(lambda p, x: STUDENT.apply({"params": p}, x), left["params"], BATCH["image"])
    watched = count(lambda v, b: TASK.metrics(v, b), held, BATCH)
    assert watched.macs == alone.macs


def recipe(**changes):
    """The smallest run in which a slimmed network is taught."""
    config = smoke("configs.vision.sit", train__steps="2 steps", evaluators={})
    teacher = config.model.to_dict()
    del teacher["reduce"]
    config.task = dict(kind="distillation", teacher=teacher, tokens=1.0, **changes)
    return config


def program_of(config):
    experiment = resolve(config)
    return build_program(experiment, experiment.data.open(), jax.devices()[:1])


@pytest.mark.slow
def test_a_run_starts_from_another_and_is_taught_by_it(tmp_path):
    config = recipe()
    teacher = config.copy_and_resolve_references()
    teacher.model, teacher.task = config.task.teacher, dict(kind="classification")
    first = program_of(teacher)
    (tmp_path / "config.json").write_text(json.dumps({"config": teacher.to_dict()}))
    with contextlib.closing(Checkpoints(tmp_path / "checkpoints")) as saved:
        saved.save(0, first.init(), {})
    with pytest.raises(UsageError, match=r"config\.task\.weights is missing"):
        first_state(program_of(config))
    config.task.weights, config.train.start = str(tmp_path), str(tmp_path)
    with pytest.raises(UsageError, match="reduce_1/scores/kernel"):
        first_state(program_of(config))
    config.train.fresh = ("reduce_.*",)
    program = program_of(config)
    state = first_state(program)
    weights = first.init().ema
    jax.tree.map(np.testing.assert_array_equal, state.collections["teacher"]["params"], weights)
    jax.tree.map(np.testing.assert_array_equal, state.params["blocks"], weights["blocks"])
    assert set(state.params) == {*weights, "reduce_1", "recalibration"}
    cost = forward_cost(program)
    assert not any("recalibration" in path for path in cost.parameters_by_path)
    recorder = Recorder()
    before = jax.tree.map(np.asarray, state.collections["teacher"])
    outcome = fit(
        program,
        state,
        checkpoints=(memory := Memory()),
        observer=recorder,
        stop_requested=lambda: False,
        read=no_weights,
    )
    last = memory.saved[max(memory.saved)][0]
    jax.tree.map(np.testing.assert_array_equal, last.collections["teacher"], before)
    assert np.isfinite(recorder.losses()).all()
    assert outcome is not None
    assert set(program.variables(last, ema=False)) == {"params"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(teacher=vit(classes=7)), "knows 7 classes and the student 5"),
        (dict(teacher=vit(depth=3)), "one depth and width"),
    ],
)
def test_teachers_that_do_not_fit(changes, message):
    with pytest.raises(UsageError, match=message):
        Distillation(**({"model": vit(), "tokens": 1.0} | changes))
