"""Projections, and sums in blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.layers.dense import Dense


def projected(block, x, features=(3, 5), dtype=jnp.float32):
    layer = Dense(features, ("embed", "heads", "head_dim"), block=block)
    variables = jax.tree.map(lambda leaf: leaf.astype(dtype), layer.init(jax.random.key(0), x))
    return layer.apply(variables, x.astype(dtype))


@pytest.mark.parametrize("shape", [(24,), (4, 24), (2, 3, 24)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_blocks_are_the_same_sum(shape, dtype):
    x = jax.random.normal(jax.random.key(1), shape)
    whole, blocked = projected(None, x, dtype=dtype), projected(8, x, dtype=dtype)
    assert blocked.dtype == dtype
    assert blocked.shape == (*shape[:-1], 3, 5)
    tolerance = 1e-6 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(
        whole.astype(jnp.float32), blocked.astype(jnp.float32), rtol=tolerance, atol=tolerance
    )


def test_what_does_not_divide_is_summed_at_once():
    x = jax.random.normal(jax.random.key(1), (4, 10))
    np.testing.assert_array_equal(projected(8, x), projected(None, x))


def test_blocks_round_less():
    """A sum of 8192 products of one sign, against float64."""
    x = jax.random.uniform(jax.random.key(1), (4, 8192))
    layer = Dense(64, ("embed", "mlp"), use_bias=False)
    variables = {"params": {"kernel": jax.random.uniform(jax.random.key(2), (8192, 64))}}
    exact = np.asarray(x, np.float64) @ np.asarray(variables["params"]["kernel"], np.float64)

    def error(block):
        return np.abs(np.asarray(layer.clone(block=block).apply(variables, x), np.float64) - exact).max()

    assert error(128) < error(None)
