import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.errors import UsageError
from effjax.models.autoencoder import Autoencoder
from effjax.train.tasks.autoencoding import Autoencoding
from effjax.train.tasks.mean import values

MODEL = Autoencoder(widths=(4, 4), latent=2, channels=1, blocks=1, groups=2)


def batch():
    images = jax.random.uniform(jax.random.key(3), (3, 4, 4, 1), minval=-1, maxval=1)
    return {"image": images, "mask": jnp.asarray([1.0, 1.0, 0.0])}


def test_loss_is_distance_and_weighted_divergence_of_a_drawn_code():
    task = Autoencoding(MODEL, distance="squared", kl=0.5)
    variables = meta.unbox(jax.jit(task.init)(jax.random.key(0), batch()))
    ready = task.prepare(batch(), jax.random.key(1))
    assert ready["noise"].shape == (3, 2, 2, 2)
    means, collections = jax.jit(task.loss)(variables, ready, jax.random.key(2))
    assert not collections
    again = jax.jit(MODEL.apply)(variables, ready["image"], ready["noise"])
    squared = jnp.mean((again - ready["image"]) ** 2)
    expected = squared + 0.5 * means["kl"].value() / 16
    np.testing.assert_allclose(means["squared"].value(), squared, rtol=1e-5)
    np.testing.assert_allclose(means["loss"].value(), expected, rtol=1e-5)


def test_metrics_take_the_mean_of_the_code_and_leave_padding_out():
    task = Autoencoding(MODEL)
    variables = meta.unbox(jax.jit(task.init)(jax.random.key(0), batch()))
    found = task.finish({k: float(v) for k, v in values(jax.jit(task.metrics)(variables, batch())).items()})
    real = batch()["image"][:2]
    again = jax.jit(MODEL.apply)(variables, real)
    mean, _ = jax.jit(functools.partial(MODEL.apply, method="encode"))(variables, real)
    np.testing.assert_allclose(found["loss"], jnp.mean(jnp.abs(again - real)), rtol=1e-5)
    np.testing.assert_allclose(found["latent_std"], np.std(mean), rtol=1e-4)
    mse = float(jnp.mean((again - real) ** 2))
    np.testing.assert_allclose(found["psnr"], 10 * np.log10(2**2 / mse), rtol=1e-5)


def test_a_negative_weight_is_refused():
    with pytest.raises(UsageError, match="kl=-1 must not be negative"):
        Autoencoding(MODEL, kl=-1.0)
