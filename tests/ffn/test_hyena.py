"""Hyena-X along the channels, against the sums of its equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.errors import UsageError
from effjax.ffn.hyena import HyenaFFN
from effjax.ffn.mlp import MLP


def test_it_is_its_equation():
    draw = np.random.default_rng(0)
    x, ffn = draw.normal(size=(2, 5, 4)), HyenaFFN(ratio=1.5, taps=3)
    shapes = meta.unbox(jax.eval_shape(ffn.init, jax.random.key(0), jnp.float32(x)))["params"]
    p = jax.tree.map(lambda leaf: draw.normal(size=leaf.shape), shapes)
    u = x @ p["project"]["kernel"] + p["project"]["bias"]
    filtered = np.zeros_like(u)
    for b, n, f in np.ndindex(u.shape):
        filtered[b, n, f] = p["bias"][n] + sum(
            p["kernel"][j, n] * u[b, n, f - 2 + j] for j in range(3) if f - 2 + j >= 0
        )
    q, k, v = np.split(filtered, 3, axis=-1)
    wanted = (q * k * v) @ p["output"]["kernel"] + p["output"]["bias"]
    got = jax.jit(lambda p, x: ffn.apply({"params": p}, x))(jax.tree.map(jnp.float32, p), jnp.float32(x))
    np.testing.assert_allclose(got, wanted, rtol=2e-4, atol=2e-4)


def test_it_is_as_large_as_a_perceptron_of_ratio_4():
    x = jnp.zeros((1, 256, 1152))
    size, other = (
        sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(ffn.init, jax.random.key(0), x)))
        for ffn in (HyenaFFN(), MLP())
    )
    assert size == pytest.approx(other * 1.0003, rel=1e-4)


def test_another_length_is_refused():
    held = meta.unbox(HyenaFFN().init(jax.random.key(0), jnp.ones((1, 4, 2))))
    with pytest.raises(UsageError, match="filters for 4 tokens and gets 6"):
        HyenaFFN().apply(held, jnp.ones((1, 6, 2)))
