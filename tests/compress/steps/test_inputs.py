import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.compress.steps.inputs import CalibrateInputs, best_share, histogram, quantiles
from effjax.compress.steps.round import Round
from effjax.compress.storage.inputs import Static, Token
from effjax.compress.storage.trees import stored_in
from effjax.compress.storage.uniform import Uniform
from effjax.compress.subject import Calibration, Subject
from effjax.errors import UsageError
from effjax.layers.conv import ConvNorm
from effjax.layers.dense import Dense
from effjax.train.tasks.classification import Classification


class Net(nn.Module):
    """A convolution, a depthwise one, and a head."""

    @nn.compact
    def __call__(self, x, train=False):
        x = ConvNorm(8, 3, activation="relu", name="stem")(x, train)
        x = ConvNorm(None, 3, depthwise=True, name="depthwise")(x, train)
        return Dense(4, ("embed", None), name="head")(x.mean((1, 2)))


RANDOM = np.random.default_rng(0)
IMAGES = jnp.asarray(RANDOM.normal(size=(6, 8, 8, 3)), jnp.float32)


def batch(images):
    count = len(images)
    return {"image": images, "label": jnp.arange(count) % 4, "mask": jnp.ones(count)}


@pytest.fixture(scope="module")
def subject():
    task = Classification(model=Net())
    variables = meta.unbox(jax.jit(task.init)(jax.random.key(0), batch(IMAGES)))
    whole = Subject(task, variables, batch(IMAGES[:1]))
    return Round(Uniform(8, 0)).apply(whole, calibration())


def calibration(batches=None):
    batches = [batch(IMAGES), batch(2 * IMAGES)] if batches is None else batches
    return Calibration(lambda: batches, jax.random.key(0), report=lambda text: None)


def test_ranges_of_convolutions_and_products_are_seen_in_one_pass(subject):
    found = stored_in(CalibrateInputs(how="min_max").apply(subject, calibration()).params)
    assert sorted(found) == ["depthwise/conv/kernel", "head/kernel", "stem/conv/kernel"]
    stem = found["stem/conv/kernel"].inputs
    np.testing.assert_allclose([stem.low, stem.high], [2 * IMAGES.min(), 2 * IMAGES.max()], rtol=1e-6)
    assert found["depthwise/conv/kernel"].inputs.low == 0  # behind a ReLU
    averaged = stored_in(CalibrateInputs(how="ema", decay=0.75).apply(subject, calibration()).params)
    high = averaged["stem/conv/kernel"].inputs.high
    np.testing.assert_allclose(high, (0.75 + 0.25 * 2) * IMAGES.max(), rtol=1e-6)


def test_a_network_of_8_bit_inputs_answers_as_one_of_floats(subject):
    def logits(subject):
        return jax.jit(subject.model.apply)(subject.variables, IMAGES)

    exact = logits(subject)
    for inputs, how in ((Static(), "mse"), (Token(), "ema")):
        error = logits(CalibrateInputs(inputs, how=how).apply(subject, calibration())) - exact
        assert 0 < jnp.sqrt(jnp.mean(error**2)) < 0.01 * jnp.std(exact)


def test_quantiles_and_errors_are_those_of_the_numbers(draw):
    x = draw.standard_t(3, 20000).astype(np.float32)
    counts = np.asarray(jax.jit(histogram)(jnp.asarray(x)))
    assert counts.sum() == x.size
    np.testing.assert_allclose(
        quantiles(counts, (0.001, 0.5, 0.999)), np.quantile(x, (0.001, 0.5, 0.999)), rtol=8e-3, atol=2e-3
    )

    def error(share):
        low, high = share * x.min(), share * x.max()
        s = (high - low) / 15
        z = np.round(-low / s)
        return np.mean(((np.clip(np.round(x / s) + z, 0, 15) - z) * s - x) ** 2)

    share = best_share(counts, float(x.min()), float(x.max()), 4, 80)
    assert error(share) < 1.01 * min(error(1 - 0.01 * i) for i in range(80)) < 0.8 * error(1)


def test_nan_names_the_kernel_it_enters(subject):
    bad = [batch(IMAGES.at[3, 0, 0, 0].set(jnp.nan))]
    with pytest.raises(UsageError, match=r"stem/conv/kernel .*NaN"):
        CalibrateInputs().apply(subject, calibration(bad))


def test_kernels_must_be_stored_before(subject):
    whole = subject.with_params(meta.unbox(subject.task.init(jax.random.key(0), batch(IMAGES)))["params"])
    with pytest.raises(UsageError, match="'round' before"):
        CalibrateInputs().apply(whole, calibration())
    with pytest.raises(UsageError, match="matches no"):
        CalibrateInputs(kernels=("tail/.*",)).apply(subject, calibration())
