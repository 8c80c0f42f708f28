import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.errors import UsageError
from effjax.mixers.attention import Attention
from effjax.mixers.context import Context
from effjax.mixers.cross_attention import CrossAttention


def setting():
    x, memory = jax.random.normal(jax.random.key(0), (2, 2, 5, 8))
    cross = CrossAttention(heads=2)
    return cross, meta.unbox(jax.jit(cross.init)(jax.random.key(1), x, memory)), x, memory


def test_reading_oneself_is_self_attention():
    cross, variables, x, _ = setting()
    plain = jax.jit(Attention(heads=2).apply)(variables, x, Context())
    np.testing.assert_allclose(jax.jit(cross.apply)(variables, x, x), plain, atol=1e-6)


def test_what_is_not_valid_is_not_read():
    cross, variables, x, memory = setting()
    valid = jnp.array([[True, True, False, True, False]] * 2)
    run = jax.jit(cross.apply)
    y = run(variables, x, memory, valid)
    np.testing.assert_allclose(y, run(variables, x, memory[:, valid[0]]), atol=1e-6)
    np.testing.assert_array_equal(y, run(variables, x, memory.at[:, 2].set(9.0), valid))


def test_heads_divide_the_width():
    with pytest.raises(UsageError, match=r"heads=3 does not divide the width 8\."):
        CrossAttention(heads=3).init(jax.random.key(0), jnp.zeros((1, 2, 8)), jnp.zeros((1, 2, 8)))
