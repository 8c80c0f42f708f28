"""Mixture of Blocks: all are the dense network, one that nobody wants is not computed, routers learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress.dense2moe import to_groups
from effjax.errors import UsageError
from effjax.models.blocks.mixture import MixtureOfBlocks
from tests.models.blocks.test_several import block, dit, inputs, randomised, run

KEY = jax.random.key(2)


@pytest.fixture(scope="module")
def dense():
    return randomised(dit(block()), *inputs())


def grouped(dense, chosen, size=2, balance=0.0):
    return to_groups(dit(block()), dense, size, chosen, KEY, balance)


def preferring(params, *members):
    """The same with routers that want these members whatever they are told."""
    router = params["blocks"]["router"]
    bias = jnp.stack([jnp.full(router["bias"].shape[1], -9.0).at[j].set(9.0) for j in members])
    kernel = jnp.zeros_like(router["kernel"])
    return {**params, "blocks": {**params["blocks"], "router": {"kernel": kernel, "bias": bias}}}


@pytest.mark.parametrize("size", [2, 4])
def test_all_blocks_on_are_the_dense_network(dense, size):
    model, params = grouped(dense, size, size)
    shapes = jax.tree.map(jnp.shape, randomised(model, *inputs()))
    assert jax.tree.map(jnp.shape, params) == shapes
    np.testing.assert_allclose(
        run(model, params, *inputs()), run(dit(block()), dense, *inputs()), rtol=1e-6, atol=1e-6
    )


def test_what_is_not_chosen_is_left_out(dense):
    model, params = grouped(dense, 1)
    params = preferring(params, 1, 0)  # of blocks 0 to 3 the second and the third
    shorter = {**dense, "blocks": jax.tree.map(lambda leaf: leaf[1:3], dense["blocks"])}
    wanted = run(dit(block(), depth=2), shorter, *inputs())
    np.testing.assert_allclose(run(model, params, *inputs()), wanted, rtol=1e-6, atol=1e-6)


def test_a_block_that_nobody_wants_is_not_computed(dense):
    model, params = grouped(dense, 1)
    params = preferring(params, 0, 0)
    broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), params["blocks"]["members_1"])
    params = {**params, "blocks": {**params["blocks"], "members_1": broken}}
    assert np.isfinite(run(model, params, *inputs())).all()


def test_every_example_runs_its_own(dense):
    model, params = grouped(dense, 1)
    router = {"kernel": 9.0 * jax.random.normal(KEY, (2, 8, 2)), "bias": jnp.zeros((2, 2))}
    params = {**params, "blocks": {**params["blocks"], "router": router}}
    together = run(model, params, *inputs(6))
    alone = [run(model, params, *(leaf[i : i + 1] for leaf in inputs(6))) for i in range(6)]
    np.testing.assert_allclose(together, jnp.concatenate(alone), rtol=1e-5, atol=1e-6)


def test_routers_learn_and_are_kept_even(dense):
    model, params = grouped(dense, 1, balance=0.5)

    def loss(params):
        y, sown = model.apply({"params": params}, *inputs(6), train=True, mutable=["losses"])
        return jnp.mean(y**2), jnp.sum(jnp.asarray(jax.tree.leaves(sown)))

    (_, balance), vjp = jax.vjp(jax.jit(loss), params)
    assert 0.5 * 2 * 0.99 < balance < 0.5 * 2 * 2  # of two groups; 0.5 each where blocks are used evenly
    slope = vjp((jnp.float32(1), jnp.float32(0)))[0]["blocks"]["router"]["kernel"]
    assert np.abs(slope).max(axis=(1, 2)).min() > 1e-9
    # With one chosen and both equally probable the balance is least.
    even = {
        **params,
        "blocks": {**params["blocks"], "router": jax.tree.map(jnp.zeros_like, params["blocks"]["router"])},
    }
    np.testing.assert_allclose(jax.jit(loss)(even)[1], 0.5 * 2, rtol=1e-6)


def test_bad_requests_are_named(dense):
    with pytest.raises(UsageError, match="chosen=3 of 2 blocks"):
        MixtureOfBlocks((block(), block()), chosen=3)
    with pytest.raises(UsageError, match="4 blocks make no groups of 3"):
        grouped(dense, 1, 3)
    model, params = grouped(dense, 1)
    with pytest.raises(UsageError, match="DiT's own blocks"):
        to_groups(model, params, 1, 1, KEY)
    with pytest.raises(UsageError, match="no branches to keep"):
        model.apply(
            {"params": params},
            model.apply({"params": params}, *inputs(), method="begin"),
            jnp.ones((2, 4), bool),
            jnp.zeros((2, 4, 2, 16, 8)),
            method="recall",
        )
