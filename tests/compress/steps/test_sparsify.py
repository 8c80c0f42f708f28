import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress.steps.sparsify import Densify, Sparsify, scored, smallest
from effjax.compress.storage.trees import stored_in
from effjax.compress.subject import Calibration
from effjax.errors import UsageError
from effjax.layers.stored import RANGES
from tests.compress import tiny

CALIBRATION = Calibration(lambda: iter([tiny.BATCH]), jax.random.key(0), report=lambda told: None)


def by_hand(numbers):
    """w^2 / sum of the squares of all that are not smaller, one at a time."""
    squares = np.square(np.asarray(numbers, np.float64)).ravel()
    return np.array([own / squares[squares >= own].sum() for own in squares])


@pytest.fixture
def matrices(draw):
    shapes = {"mixer/query/kernel": (2, 4, 6), "mixer/key/kernel": (2, 4, 3), "ffn/expand/kernel": (2, 4, 5)}
    return {
        f"blocks/{path}": jnp.asarray(draw.normal(size=shape), jnp.float32) for path, shape in shapes.items()
    }


def test_scores_are_shares_of_a_matrix_or_of_a_module(matrices):
    lamp, dimap = scored(matrices, "lamp"), scored(matrices, "dimap")
    for path, matrix in matrices.items():
        for layer in range(2):
            np.testing.assert_allclose(
                np.asarray(lamp[path])[layer].ravel(), by_hand(matrix[layer]), rtol=1e-5
            )
    query, key, ffn = matrices
    for layer in range(2):
        module = np.concatenate([np.asarray(matrices[p][layer]).ravel() for p in (query, key)])
        found = np.concatenate([np.asarray(dimap[p][layer]).ravel() for p in (query, key)])
        np.testing.assert_allclose(found, by_hand(module), rtol=1e-5)
        assert found.max() == 1, "the largest of a module is all that is left with it"
    np.testing.assert_allclose(dimap[ffn], lamp[ffn])


def test_a_module_of_another_scale_has_the_same_scores(matrices):
    larger = {p: m * (100.0 if "/mixer/" in p else 1.0) for p, m in matrices.items()}
    before, after = scored(matrices, "dimap"), scored(larger, "dimap")
    for path in matrices:
        np.testing.assert_allclose(before[path], after[path], rtol=1e-5)
    masks = [smallest(scored(found, "global"), 0.5) for found in (matrices, larger)]
    assert any((masks[0][path] != masks[1][path]).any() for path in matrices)


@pytest.mark.parametrize("worth", ["random", "magnitude", "global", "lamp", "dimap"])
def test_the_share_is_exact_and_the_network_runs(worth):
    network = tiny.language()
    sparse = Sparsify(0.5, worth).apply(network, CALIBRATION)
    leaves = stored_in(sparse.params).values()
    zeros, size = (
        sum(int((leaf.kernel == 0).sum()) for leaf in leaves),
        sum(leaf.kernel.size for leaf in leaves),
    )
    assert zeros == size // 2
    run = jax.jit(sparse.task.metrics)
    dense = dataclasses.replace(network, variables=Densify().apply(sparse, CALIBRATION).variables)
    assert RANGES not in dense.variables
    assert not stored_in(dense.params)
    np.testing.assert_array_equal(
        run(sparse.variables, tiny.BATCH)["loss"].value(), run(dense.variables, tiny.BATCH)["loss"].value()
    )


def test_patterns_and_what_cannot_be():
    sparse = Sparsify(pattern=(2, 4)).apply(tiny.language(), CALIBRATION)
    assert all(float(leaf.sparsity) == 0.5 for leaf in stored_in(sparse.params).values())
    with pytest.raises(UsageError, match="do not divide"):
        Sparsify(pattern=(2, 3)).apply(tiny.language(), CALIBRATION)
    with pytest.raises(UsageError, match="asks for worth"):
        Sparsify(pattern=(2, 4), worth="lamp")
    with pytest.raises(UsageError, match="has a mask to drop"):
        Densify().apply(tiny.language(), CALIBRATION)
