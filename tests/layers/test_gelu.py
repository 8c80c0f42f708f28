"""gelu to float32's rounding, and its slope."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from effjax.layers.activations import gelu

X = jnp.linspace(-12, 12, 20_001, dtype=jnp.float32)


def exact(x):
    x = np.float64(x)
    below, density = (1 + erf(x / np.sqrt(2))) / 2, np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    return x * below, below + x * density


def test_it_is_exact_to_the_rounding_of_its_argument():
    off = np.abs(np.float64(jax.jit(gelu)(X)) - exact(X)[0])
    assert np.max(off / np.spacing(np.maximum(np.abs(X), np.float32(1e-2)))) < 4


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_its_slope(mode):
    ones = jnp.ones_like(X)
    slope = jax.jvp(gelu, (X,), (ones,))[1] if mode == "forward" else jax.vjp(gelu, X)[1](ones)[0]
    np.testing.assert_allclose(slope, exact(X)[1], atol=2e-6)


def test_bfloat16_is_rounded_once():
    x = jnp.asarray(X, jnp.bfloat16)
    wanted = jnp.asarray(exact(np.float32(x))[0], jnp.bfloat16)
    assert gelu(x).dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(gelu(x)), np.float32(wanted), rtol=2**-7, atol=2e-6)
