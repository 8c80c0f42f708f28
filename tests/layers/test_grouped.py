import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.layers.grouped import apart, grouped_conv, together

X = jax.random.normal(jax.random.key(0), (2, 5, 6, 8))
KERNEL = jax.random.normal(jax.random.key(1), (3, 3, 2, 12))


@pytest.mark.parametrize("stride", [1, 2])
def test_both_ways_and_their_gradients_are_one_sum(stride):
    options = dict(stride=stride, padding=1, groups=4)

    def loss(how, x, kernel):
        y = how(x, kernel)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=jnp.float32).reshape(y.shape)))

    ways = [
        lambda x, k: together(x, k, **options),
        lambda x, k: apart(x, k, **options),
        lambda x, k: grouped_conv(x, k, stride, 1, 4),
    ]
    outputs = [jax.jit(way)(X, KERNEL) for way in ways]
    gradients = [
        jax.jit(jax.grad(lambda x, k, w=way: loss(w, x, k), argnums=(0, 1)))(X, KERNEL) for way in ways
    ]
    for y, gradient in zip(outputs, gradients, strict=True):
        np.testing.assert_allclose(y, outputs[0], atol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), gradient, gradients[0])


def test_a_group_sees_its_own_channels_alone():
    changed = X.at[..., :2].add(1.0)
    before, after = (grouped_conv(x, KERNEL, 1, 1, 4) for x in (X, changed))
    assert not np.allclose(before[..., :3], after[..., :3])
    assert np.array_equal(before[..., 3:], after[..., 3:])
