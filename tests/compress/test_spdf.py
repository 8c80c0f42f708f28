"""Sparse pre-training, dense fine-tuning: what is zero stays so until the masks go."""

import contextlib

import jax
import numpy as np
import pytest

from configs.compress import densify
from effjax.compress.recipe import read
from effjax.compress.storage.trees import leaves_of, stored_in
from effjax.compress.subject import Calibration, Subject
from effjax.layers.stored import RANGES
from effjax.train.checkpoint import Checkpoints
from effjax.train.step import loss_and_gradient
from tests.train.toy import program_of


@pytest.fixture(scope="module")
def program():
    return program_of("configs.language.spdf")


@pytest.fixture(scope="module")
def batch(program):
    with contextlib.closing(program.data.train()) as rows:
        return jax.device_put(next(rows), program.batch_sharding)


@pytest.fixture(scope="module")
def trained(program, batch):
    """The state before the first step, and after three."""
    first = program.init()
    state = jax.tree.map(lambda leaf: leaf.copy(), first)
    for _ in range(3):
        state, _ = program.step(state, batch)
    return first, state


def gone(state):
    """Where the numbers of every masked kernel are zero."""
    return {path: np.asarray(leaf.kernel) == 0 for path, leaf in stored_in(state.params).items()}


def test_every_matrix_of_the_blocks_has_as_many_zeros_and_all_else_is_dense(trained):
    first, _ = trained
    masks = gone(first)
    names = (
        "mixer/query",
        "mixer/key",
        "mixer/value",
        "mixer/output",
        "ffn/gate",
        "ffn/expand",
        "ffn/contract",
    )
    assert set(masks) == {f"blocks/{name}/kernel" for name in names}
    for zeros in masks.values():
        layers = zeros.reshape(len(zeros), -1)
        assert (layers.sum(1) == 0.75 * layers.shape[1]).all()
        assert (layers[0] != layers[1]).any(), "every layer has a mask of its own"
    others = {path: leaf for path, leaf in leaves_of(first.params).items() if path not in masks}
    assert all(np.all(np.asarray(leaf) != 0) for leaf in others.values())


def test_zeros_have_no_gradient_no_moments_and_stay(program, batch, trained):
    first, state = trained
    masks, later = gone(first), gone(state)
    loss = jax.jit(lambda state: loss_and_gradient(program.task, state, batch, program.precision, 1))
    gradient = stored_in(loss(state)[1])
    moments = [part for part in jax.tree.leaves(state.opt_state, is_leaf=moment) if moment(part)]
    assert len(moments) == 1
    for path, zeros in masks.items():
        np.testing.assert_array_equal(zeros, later[path])
        for tree in (gradient, stored_in(moments[0].mu), stored_in(moments[0].nu)):
            found = np.asarray(tree[path].kernel)
            assert not found[zeros].any()
            assert found[~zeros].any()


def moment(part):
    return hasattr(part, "mu")


def test_zeros_stay_after_a_checkpoint_was_read(program, batch, trained, tmp_path):
    first, state = trained
    with contextlib.closing(Checkpoints(tmp_path, report=lambda _: None)) as saved:
        saved.save(3, state, {})
        saved.wait()
        again = saved.restore(program.shapes).state
    for path, mask in leaves_of(again.collections[RANGES]).items():
        np.testing.assert_array_equal(mask, ~gone(first)[path.removesuffix("/mask")])
    again, _ = program.step(again, batch)
    jax.tree.map(np.testing.assert_array_equal, gone(again), gone(first))


def test_the_first_dense_step_gives_what_the_sparse_network_gave_and_all_numbers_learn(
    program, batch, trained
):
    first, state = trained
    subject = Subject(program.task, {"params": state.params, **state.collections}, batch)
    calibration = Calibration(lambda: iter(()), jax.random.key(0))
    dense = read(densify.get_config()).apply(subject, calibration)
    assert not stored_in(dense.params)
    key = jax.random.key(1)
    value = lambda variables: program.task.loss(variables, batch, key)[0]["loss"].value()
    before = jax.jit(value)({"params": state.params, **state.collections})
    after, gradient = jax.jit(jax.value_and_grad(lambda params: value({"params": params})))(dense.params)
    assert before == after
    found = leaves_of(gradient)
    for path, zeros in gone(first).items():
        share = np.mean(np.asarray(found[path])[zeros] != 0)
        assert share > 0.99
