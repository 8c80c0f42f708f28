import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.errors import UsageError
from effjax.mixers.context import Context
from effjax.mixers.pooling import Pooling, average


def mean_of_neighbours(x, size):
    y = np.zeros_like(x)
    for i, j in np.ndindex(*x.shape[1:3]):
        r = size // 2
        y[:, i, j] = x[:, max(i - r, 0) : i + r + 1, max(j - r, 0) : j + r + 1].mean((1, 2))
    return y


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("shape", [(2, 6, 5, 3), (1, 1, 4, 2), (1, 2, 2, 1)])
def test_the_mean_counts_places_on_the_map_alone(size, shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    np.testing.assert_allclose(average(jnp.asarray(x), size), mean_of_neighbours(x, size), atol=1e-5)
    mixed = Pooling(size).apply({}, jnp.asarray(x), Context())
    np.testing.assert_allclose(mixed, mean_of_neighbours(x, size) - x, atol=1e-5)


def test_a_constant_map_gives_zero_at_the_edges_too():
    x = jnp.full((1, 7, 5, 2), 3.7)
    np.testing.assert_allclose(Pooling(3).apply({}, x, Context()), 0.0, atol=1e-6)


def test_the_gradient_is_the_transposed_map():
    """Column by column: the gradient of one output is a row of the matrix that the mean is."""
    x = jnp.zeros((1, 4, 3, 1))
    matrix = np.stack([mean_of_neighbours(e.reshape(1, 4, 3, 1), 3).ravel() for e in np.eye(12)], axis=1)
    jacobian = jax.jacrev(lambda x: average(x, 3))(x).reshape(12, 12)
    np.testing.assert_allclose(jacobian, matrix, atol=1e-6)
    assert not np.allclose(matrix, matrix.T)


def test_neighbourhoods_without_a_middle_are_refused():
    with pytest.raises(UsageError, match="size=2"):
        Pooling(2)
