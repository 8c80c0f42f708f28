"""Features that become those of a teacher: the distance, what is inherited, and what stays as it was."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.errors import UsageError
from effjax.experiment import resolve
from effjax.train.checkpoint import Checkpoints
from effjax.train.loop import fit
from effjax.train.program import build_program
from effjax.train.tasks import served
from effjax.train.tasks.alignment import Alignment, cosine
from effjax.train.tasks.mean import values
from experiments.run.training import first_state
from tests.tokens.tiny import images, vit
from tests.train.toy import Memory, Recorder, no_weights, smoke

BATCH = {"image": images(3)}
KEY = jax.random.key(3)


def task_of(**changes):
    return Alignment(**({"model": vit(depth=2), "teacher": vit(depth=1), "inherits": False} | changes))


def program_of(config):
    experiment = resolve(config)
    return build_program(experiment, experiment.data.open(), jax.devices()[:1])


def recipe(**changes):
    """The smallest run in which a SparseFormer is taught."""
    config = smoke("configs.vision.sparseformer", evaluators={}, train__log_every="1 steps", **changes)
    config.model.tuned, config.model.depth = 1, 2
    block = dict(mixer=dict(kind="attention", heads=2), ffn=dict(kind="mlp"))
    teacher = dict(kind="vit", patch=4, dim=32, depth=3, classes=10, block=block)
    config.task = dict(kind="alignment", teacher=teacher)
    config.optimizer = dict(kind="adamw", lr=3e-3, freeze=("blocks/.*", "norm/.*", "head/.*"))
    return config


def test_the_cosine_is_that_of_the_angle():
    a, b = np.random.RandomState(0).standard_normal((2, 4, 7))
    wanted = [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(cosine(jnp.asarray(a), jnp.asarray(b)), wanted, rtol=1e-5)
    zero = jnp.zeros((1, 3))
    slope = jax.grad(lambda x: cosine(x, jnp.ones((1, 3)))[0])(zero)
    assert cosine(zero, zero)[0] == 0
    assert bool(jnp.isfinite(slope).all())


@pytest.mark.slow
def test_features_are_compared_and_the_teacher_learns_nothing():
    task = task_of()
    held = meta.unbox(jax.jit(task.init)(jax.random.key(0), BATCH))
    z = vit(depth=2, classes=0).apply({"params": held["params"]}, BATCH["image"])
    goal = vit(depth=1, classes=0).apply(held["teacher"], BATCH["image"])
    wanted = {"cosine": np.mean(1 - cosine(z, goal)), "squared": np.mean((z - goal) ** 2)}
    batch = task.prepare({**BATCH, "label": jnp.zeros(3, jnp.int32)}, KEY)
    assert set(batch) == {"image"}
    for distance, value in wanted.items():
        means, collections = jax.jit(task_of(distance=distance).loss)(held, batch, KEY)
        np.testing.assert_allclose(values(means)["loss"], value, rtol=1e-5)
        jax.tree.map(np.testing.assert_array_equal, collections["teacher"], held["teacher"])
    slopes = jax.jit(jax.grad(lambda v: task.loss(v, batch, KEY)[0]["loss"].total))(held)
    assert not any(bool(jnp.any(g)) for g in jax.tree.leaves((slopes["teacher"], slopes["params"]["head"])))
    assert bool(jnp.any(slopes["params"]["blocks"]["ffn"]["expand"]["kernel"]))
    assert set(served(task, held)) == {"params"}


def test_a_student_that_is_its_teacher_loses_nothing():
    task = task_of(model=vit(depth=1))
    params = meta.unbox(jax.jit(vit(depth=1).init)(jax.random.key(0), BATCH["image"]))
    held = {**params, "teacher": params}
    np.testing.assert_allclose(values(jax.jit(task.loss)(held, BATCH, KEY)[0])["loss"], 0, atol=1e-6)


def test_the_teacher_may_see_larger_pictures():
    task = task_of(teacher_size=16)
    shapes = meta.unbox(jax.eval_shape(task.init, jax.random.key(0), BATCH))
    own, of_teacher = shapes["params"], shapes["teacher"]["params"]
    assert (own["positions"].shape[0], of_teacher["positions"].shape[0]) == (17, 65)
    jax.eval_shape(task.loss, shapes, BATCH, KEY)


@pytest.mark.slow
def test_frozen_parameters_get_no_update():
    program = program_of(recipe())
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), program.shapes.params)
    state = program.optimizer.init(params)
    updates, _ = jax.jit(program.optimizer.update)(params, state, params)
    for name, tree in updates.items():
        moved = [bool(jnp.any(leaf)) for leaf in jax.tree.leaves(tree)]
        assert (not any(moved)) if name in ("blocks", "norm", "head") else all(moved), name


@pytest.mark.slow
def test_a_run_begins_with_its_teacher_and_comes_nearer_to_it(tmp_path):
    config = recipe(train__steps="20 steps")
    with pytest.raises(UsageError, match=r"config\.task\.weights is missing"):
        first_state(program_of(config))
    teacher = config.copy_and_resolve_references()
    teacher.model, teacher.task = config.task.teacher, dict(kind="classification")
    teacher.optimizer.freeze = ()
    first = program_of(teacher)
    (tmp_path / "config.json").write_text(json.dumps({"config": teacher.to_dict()}))
    with contextlib.closing(Checkpoints(tmp_path / "checkpoints")) as saved:
        saved.save(0, first.init(), {})
    config.task.weights = str(tmp_path)
    program = program_of(config)
    state = first_state(program)
    weights = first.init().ema
    for at, name in ((1, "tuned_blocks"), (2, "blocks")):
        jax.tree.map(
            lambda got, whole, at=at: np.testing.assert_array_equal(got, whole[at : at + 1]),
            state.params[name],
            weights["blocks"],
        )
    np.testing.assert_array_equal(state.params["class_token"], weights["class_token"])
    jax.tree.map(np.testing.assert_array_equal, state.params["head"], weights["head"])
    before = jax.tree.map(np.asarray, state.params)
    recorder, memory = Recorder(), Memory()
    fit(program, state, checkpoints=memory, observer=recorder, stop_requested=lambda: False, read=no_weights)
    last = memory.saved[max(memory.saved)][0].params
    for name in ("blocks", "norm", "head"):
        jax.tree.map(np.testing.assert_array_equal, last[name], before[name])
    for name in ("tuned_blocks", "focus", "latent_token", "class_token"):
        pairs = zip(jax.tree.leaves(last[name]), jax.tree.leaves(before[name]), strict=True)
        assert any(np.any(got != start) for got, start in pairs), name
    losses = recorder.losses()
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(teacher=vit(dim=8)), "the teacher has 8 and the student 16"),
        (dict(inherits=True), "a SparseFormer inherits from a ViT"),
    ],
)
def test_teachers_that_do_not_fit(changes, message):
    with pytest.raises(UsageError, match=message):
        task_of(**changes)
