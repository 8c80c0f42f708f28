import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import meta

from effjax.compress.storage.masked import Masked
from effjax.compress.storage.trees import boxed_like, stored_in, with_beside
from effjax.errors import UsageError
from effjax.layers.stored import RANGES, Place, kernels
from tests.compress import tiny

PLACE = Place((2, 8, 6), ("layers", "embed", "mlp"), (8,), (6,), False, "a/kernel")


def test_as_many_numbers_of_every_matrix_go_and_others_stay(draw):
    kernel = jnp.asarray(draw.normal(size=(2, 8, 6)), jnp.float32)
    stored = Masked(0.75).store(kernel, PLACE)
    zeros = np.asarray(stored.kernel == 0)
    assert zeros.sum((1, 2)).tolist() == [36, 36]
    np.testing.assert_array_equal(np.asarray(stored.kernel)[~zeros], np.asarray(kernel)[~zeros])
    elsewhere = dataclasses.replace(PLACE, path="b/kernel")
    other = Masked(0.75).store(kernel, elsewhere)
    assert (zeros != np.asarray(other.kernel == 0)).any(), "every kernel has a mask of its own"
    again = Masked(0.75).store(kernel, PLACE)
    np.testing.assert_array_equal(stored.kernel, again.kernel)


def test_of_every_so_many_neighbours_the_worthiest_stay(draw):
    matrix = jnp.asarray(draw.normal(size=(2, 8, 6)), jnp.float32)
    kept = np.asarray(Masked(pattern=(2, 4)).cut(matrix, jnp.abs(matrix), PLACE).kernel)
    groups = np.abs(np.asarray(matrix)).reshape(2, 2, 4, 6)
    limit = np.sort(groups, axis=2)[:, :, 2:3]
    np.testing.assert_array_equal(kept.reshape(groups.shape) != 0, groups >= limit)
    with pytest.raises(UsageError, match="8 inputs, which 3"):
        Masked(pattern=(1, 3)).groups(8)


def test_a_network_that_starts_sparse_stays_so_while_it_trains():
    network = tiny.language()
    task = network.task
    boxed = task.init(jax.random.key(0), tiny.BATCH)
    layouts = {"blocks/.*": Masked(0.5, seed=3)}
    variables = with_beside({**boxed, "params": boxed_like(boxed["params"], layouts)})
    variables = meta.unbox(variables)
    assert set(stored_in(variables["params"])) == {
        p for p in kernels(boxed["params"]) if p.startswith("blocks/")
    }
    params, beside = variables["params"], variables[RANGES]
    optimizer = optax.adamw(1e-2)
    held = optimizer.init(params)

    @jax.jit
    def step(params, held):
        def loss(params):
            means, _ = task.loss({"params": params, RANGES: beside}, tiny.BATCH, jax.random.key(1))
            return means["loss"].value()

        value, gradients = jax.value_and_grad(loss)(params)
        updates, held = optimizer.update(gradients, held, params)
        return optax.apply_updates(params, updates), held, value, gradients

    first = None
    for _ in range(5):
        params, held, value, gradients = step(params, held)
        first = value if first is None else first
    assert value < first
    for path, leaf in stored_in(params).items():
        before = stored_in(variables["params"])[path]
        np.testing.assert_array_equal(leaf.kernel == 0, before.kernel == 0)
        gone = np.asarray(before.kernel == 0)
        assert not np.asarray(stored_in(gradients)[path].kernel)[gone].any()
        assert not np.asarray(stored_in(held[0].mu)[path].kernel)[gone].any()


def test_bad_layouts_are_refused():
    with pytest.raises(UsageError, match="sparsity=1"):
        Masked(1.0)
    with pytest.raises(UsageError, match="0 < n <= m"):
        Masked(pattern=(5, 4))
