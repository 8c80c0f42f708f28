"""Projections, and sums in blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

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


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("features", "inputs", "shape"), [((3, 4), 1, (1, 1, 6)), (5, 2, (1, 2, 3))])
def test_a_single_row_is_projected_like_many(dtype, features, inputs, shape):
    axes = (None,) * (inputs + len(np.atleast_1d(features)))
    layer = Dense(features, axes, inputs=inputs)
    x = jax.random.normal(jax.random.key(1), (5, *shape[1:])).astype(dtype)
    params = meta.unbox(layer.init(jax.random.key(0), x))
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    run = jax.jit(layer.apply)
    one, many = run(params, x[:1]), run(params, x)[:1]
    assert one.shape == many.shape
    np.testing.assert_allclose(
        one.astype(jnp.float32), many.astype(jnp.float32), rtol=1e-6 if dtype == jnp.float32 else 1e-2
    )
    slope = jax.jit(jax.grad(lambda x: jnp.sum(layer.apply(params, x).astype(jnp.float32) ** 2)))
    np.testing.assert_allclose(
        slope(x[:1]).astype(jnp.float32),
        slope(x)[:1].astype(jnp.float32),
        rtol=1e-5 if dtype == jnp.float32 else 3e-2,
    )
