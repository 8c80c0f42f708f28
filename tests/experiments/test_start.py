"""Runs that start from converted weights."""

import jax
import numpy as np
import pytest

from effjax.errors import UsageError
from effjax.interop import save_converted
from experiments.run.training import first_state
from tests.train.toy import program_of


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A folder of weights for the smoke model of vision, and the weights."""
    folder = tmp_path_factory.mktemp("weights") / "converted"
    program = program_of("vision")
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape).astype(np.float16), program.shapes.params
    )
    save_converted(folder, program.task.model, params, "timm:vit_tiny_patch16_224")
    return folder, params


def test_the_first_state_holds_the_weights_in_float32(converted):
    folder, params = converted
    program = program_of("vision", train__start=str(folder))
    state = first_state(program)
    for held in (state.params, state.ema):
        assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b.astype(np.float32)), held, params))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype(np.float32)}
    fresh = program_of("vision").init()
    assert int(state.step) == 0
    assert np.array_equal(jax.random.key_data(state.key), jax.random.key_data(fresh.key))
    assert jax.tree.structure(state) == jax.tree.structure(fresh)


def test_weights_of_another_model_are_refused_path_by_path(converted):
    folder, _ = converted
    program = program_of("vision", train__start=str(folder), model__dim=24)
    with pytest.raises(UsageError, match=r"for config.model") as error:
        first_state(program)
    assert "head/kernel" in str(error.value)
    assert "[24, 10]" in str(error.value)
    assert "[16, 10]" in str(error.value)


def test_a_folder_that_is_not_there():
    with pytest.raises(UsageError, match="'nowhere' is not there"):
        first_state(program_of("vision", train__start="nowhere"))
