import jax
import jax.numpy as jnp
import numpy as np

from effjax.layers.drop import drop_path, linear_rates


def test_whole_examples_are_dropped_and_the_mean_stays():
    x = jnp.ones((4000, 2, 3))
    y = drop_path(x, 0.25, jax.random.key(0))
    assert set(np.unique(y).round(5)) == {0.0, np.float32(4 / 3).round(5)}
    assert np.all(y == y[:, :1, :1]), "an example is kept or dropped as a whole"
    np.testing.assert_allclose(y.mean(), 1.0, atol=0.03)
    np.testing.assert_array_equal(drop_path(x, 0.0, jax.random.key(0)), x)


def test_rates_grow_from_zero():
    np.testing.assert_allclose(linear_rates(0.3, 4), [0.0, 0.1, 0.2, 0.3], atol=1e-7)
