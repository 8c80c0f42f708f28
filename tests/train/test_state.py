"""The train state: keys, counts that do not overflow, and the halt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.train import state as states
from effjax.train.state import TrainState


def make(seed=0, value=1.0):
    params = {"w": jnp.full((3,), value)}
    return TrainState.create(params, opt_state=(jnp.zeros((3,)),), key=jax.random.key(seed))


def test_all_leaves_are_arrays_and_shapes_need_no_memory():
    shapes = jax.eval_shape(make)
    assert jax.tree.structure(shapes) == jax.tree.structure(make())
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(make()))
    assert not any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(make()))


def test_the_class_also_carries_what_is_no_array():
    names = jax.tree.map(lambda leaf: str(leaf.dtype), make())
    assert (names.step, names.halted, names.examples) == ("int32", "bool", "uint32")


def test_the_key_of_a_step_follows_from_seed_purpose_and_step_alone():
    state = make(seed=3)
    expected = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), 2), 5)
    later = state.replace(step=jnp.int32(5), params=None)
    assert jnp.array_equal(jax.random.key_data(later.step_key(2)), jax.random.key_data(expected))
    drawn = {tuple(jax.random.key_data(later.step_key(p)).tolist()) for p in range(4)}
    assert len(drawn) == 4


@pytest.mark.parametrize("start", [0, 2**31 - 3, 2**32 - 1, 2**32, 2**40 + 2**32 - 4096])
def test_examples_are_counted_past_32_bits(start):
    examples = jnp.asarray(states.examples_words(start))
    for _ in range(3):
        examples = jax.jit(states.add_examples, static_argnums=1)(examples, 4096)
    assert states.examples_seen(make().replace(examples=examples)) == start + 3 * 4096


def test_a_finite_step_is_taken():
    old, new = make(value=1.0), make(value=2.0).replace(step=jnp.int32(1))
    after = states.advance(old, new, jnp.bool_(True))
    np.testing.assert_array_equal(after.params["w"], 2.0)
    assert (int(after.step), bool(after.halted)) == (1, False)


def test_a_step_that_is_not_finite_halts_and_nothing_moves_afterwards():
    old = make(value=1.0)
    bad = make(value=np.nan).replace(step=jnp.int32(1), examples=jnp.uint32([64, 0]))
    step = jax.jit(states.advance)
    halted = step(old, bad, jnp.zeros((), bool))
    good = make(value=2.0).replace(step=jnp.int32(1))
    for state in (halted, step(halted, good, jnp.bool_(True))):
        assert bool(state.halted)
        restored = state.replace(halted=old.halted)
        assert jax.tree.all(jax.tree.map(jnp.array_equal, restored, old))
