import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.errors import UsageError
from effjax.mixers.context import Context
from effjax.mixers.depthwise import Depthwise


def test_every_channel_has_a_kernel_of_its_own():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 4, 3)).astype(np.float32)
    kernel, bias = rng.normal(size=(3, 3, 3)), rng.normal(size=3)
    params = {"conv": {"kernel": jnp.float32(kernel), "bias": jnp.float32(bias)}}
    expected = np.zeros((2, 5, 4, 3)) + bias
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    for i, j, u, v in np.ndindex(5, 4, 3, 3):
        expected[:, i, j] += padded[:, i + u, j + v] * kernel[u, v]
    y = Depthwise(3).apply({"params": params}, jnp.asarray(x), Context())
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_the_bias_can_be_left_out():
    held = Depthwise(3, use_bias=False).init(jax.random.key(0), jnp.ones((1, 4, 4, 2)), Context())
    assert jax.tree.map(jnp.shape, meta.unbox(held)) == {"params": {"conv": {"kernel": (3, 3, 2)}}}


def test_kernels_without_a_middle_are_refused():
    with pytest.raises(UsageError, match="kernel=4"):
        Depthwise(4)
