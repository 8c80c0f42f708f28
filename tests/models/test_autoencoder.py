import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.errors import UsageError
from effjax.models.autoencoder import Autoencoder, divergence, drawn

TOY = Autoencoder(widths=(4, 8), latent=2, channels=1, blocks=1, groups=2, scale=0.5, shift=0.25)


@functools.cache
def variables():
    return nn.meta.unbox(jax.jit(TOY.init)(jax.random.key(0), jnp.zeros((1, 8, 12, 1))))


def pictures():
    return jax.random.uniform(jax.random.key(1), (2, 8, 12, 1), minval=-1, maxval=1)


def apply(method, *args):
    return jax.jit(functools.partial(TOY.apply, method=method))(variables(), *args)


def test_stable_diffusions_has_its_parameters():
    shapes = jax.eval_shape(Autoencoder().init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 83_653_863


def test_latents_are_the_code_scaled_and_decoding_takes_that_back():
    mean, spread = apply("encode", pictures())
    assert mean.shape == spread.shape == (2, 4, 6, 2) == (2, *TOY.latent_shape((8, 12, 1)))
    latents = apply("latents", pictures())
    np.testing.assert_allclose(latents, (mean - 0.25) * 0.5, rtol=1e-5, atol=1e-6)
    noise = jnp.ones_like(mean)
    noisy = apply("latents", pictures(), noise)
    np.testing.assert_allclose(noisy, (mean + jnp.exp(spread / 2) - 0.25) * 0.5, rtol=1e-5, atol=1e-6)
    plain = TOY.clone(scale=1.0, shift=0.0)
    again = jax.jit(functools.partial(plain.apply, method="decode"))(variables(), mean)
    np.testing.assert_allclose(apply("decode", latents), again, rtol=1e-4, atol=1e-5)


def test_any_multiple_of_the_factor_can_be_encoded():
    assert apply("encode", jnp.zeros((1, 4, 20, 1)))[0].shape == (1, 2, 10, 2)


def test_divergence_is_that_of_normal_distributions():
    """Against the integral of p log(p / q) on a fine grid."""
    mean, deviation = 0.7, 0.4
    x = np.linspace(-12, 12, 200_001)
    p = np.exp(-((x - mean) ** 2) / (2 * deviation**2)) / (deviation * np.sqrt(2 * np.pi))
    q = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    expected = np.trapezoid(p * np.log(np.maximum(p, 1e-300) / q), x)
    one = jnp.asarray([[mean, 0.0]]), jnp.asarray([[2 * np.log(deviation), 0.0]])
    np.testing.assert_allclose(divergence(*one)[0], expected, rtol=1e-4)
    many = drawn(
        jnp.full((50_000,), mean),
        jnp.full((50_000,), 2 * np.log(deviation)),
        jax.random.normal(jax.random.key(2), (50_000,)),
    )
    np.testing.assert_allclose([many.mean(), many.std()], [mean, deviation], atol=0.01)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 9, 8, 1), "9 x 8 cannot be encoded: sides must be multiples of 2"),
        ((1, 8, 8, 3), "takes 1 channels, and pictures have 3"),
    ],
)
def test_pictures_that_do_not_fit(shape, message):
    with pytest.raises(UsageError, match=message):
        TOY.apply(variables(), jnp.zeros(shape), method="encode")


def test_bad_requests():
    with pytest.raises(UsageError, match="latents of 2 channels, and these have 3"):
        TOY.apply(variables(), jnp.zeros((1, 4, 4, 3)), method="decode")
    with pytest.raises(UsageError, match="must divide every one of widths"):
        Autoencoder(widths=(4, 6), groups=4)
    with pytest.raises(UsageError, match="scale=0 must be positive"):
        Autoencoder(scale=0.0)
