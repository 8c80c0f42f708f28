import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.train.tasks import KINDS
from effjax.train.tasks.in_context import InContext
from effjax.train.tasks.mean import add, values


class Iterates(nn.Module):
    """Iterate `s` predicts `s scale x` at every place; the last `window` of three are told."""

    window: int = 3

    @nn.compact
    def __call__(self, prompt, train=False):
        scale = self.param("scale", nn.initializers.ones_init(), ())
        every = jnp.arange(1.0, 4.0)[:, None, None, None] * scale * prompt[None]
        return every[3 - self.window :]


@pytest.fixture(scope="module")
def batch():
    draw = np.random.default_rng(0)
    return {
        "prompt": jnp.float32(draw.normal(size=(4, 5, 2))),
        "targets": jnp.float32(draw.normal(size=(4, 5, 2))),
        "weights": jnp.float32(draw.integers(0, 2, (4, 5))).at[:, -1].set(1.0),
        "mask": jnp.float32([1, 1, 0, 1]),
    }


VARIABLES = {"params": {"scale": jnp.float32(1.5)}}


def errors(batch, iterate):
    """Squared errors by example and place."""
    return np.mean((iterate * 1.5 * batch["prompt"] - batch["targets"]) ** 2, axis=-1)


def test_the_loss_is_over_all_iterates_and_asked_places(batch):
    means, collections = InContext(Iterates()).loss(VARIABLES, batch, jax.random.key(0))
    asked = np.asarray(batch["weights"]) > 0
    wanted = np.mean([errors(batch, s)[asked].mean() for s in (1, 2, 3)])
    found = values(means)
    np.testing.assert_allclose(found["loss"], wanted, rtol=1e-5)
    np.testing.assert_allclose(found["last"], errors(batch, 3)[asked].mean(), rtol=1e-5)
    assert not collections


def test_evaluation_looks_at_the_last_iterate_of_rows_that_count(batch):
    found = values(InContext(Iterates()).metrics(VARIABLES, batch))
    rows = np.array([0, 1, 3])
    asked = np.asarray(batch["weights"])[rows] > 0
    np.testing.assert_allclose(found["loss"], errors(batch, 3)[rows][asked].mean(), rtol=1e-5)
    np.testing.assert_allclose(found["final"], errors(batch, 3)[rows, -1].mean(), rtol=1e-5)


def test_micro_batches_add_up(batch):
    task = InContext(Iterates())
    halves = [{name: value[part] for name, value in batch.items()} for part in (slice(2), slice(2, 4))]
    whole, _ = task.loss(VARIABLES, batch, jax.random.key(0))
    parts = [task.loss(VARIABLES, half, jax.random.key(0))[0] for half in halves]
    for name, value in values(add(*parts)).items():
        np.testing.assert_allclose(value, values(whole)[name], rtol=1e-5)


def test_a_config_names_it():
    assert KINDS["in_context"] is InContext
