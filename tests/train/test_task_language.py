import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.errors import UsageError
from effjax.ffn import Gated
from effjax.mixers import Attention
from effjax.models.lm import LM, DecoderBlock
from effjax.train.tasks import KINDS
from effjax.train.tasks.language import Language, cross_entropy
from effjax.train.tasks.mean import values
from tests.train.toy import program_of

VOCAB = 11


@pytest.fixture(scope="module")
def model():
    return LM(
        DecoderBlock(Attention(2, rotary_base=100.0, causal=True), Gated(24)), vocab=VOCAB, dim=16, depth=1
    )


@pytest.fixture(scope="module")
def batch():
    draw = np.random.default_rng(0)
    return {
        "tokens": jnp.int32(draw.integers(0, VOCAB, (3, 6))),
        "targets": jnp.int32(draw.integers(0, VOCAB, (3, 6))),
        "segments": jnp.array([[1, 1, 1, 2, 2, 2], [1] * 6, [1, 1, 2, 2, 0, 0]]),
        "positions": jnp.array([[0, 1, 2, 0, 1, 2], [*range(6)], [0, 1, 0, 1, 0, 0]]),
        "weights": jnp.float32([[1, 1, 0, 1, 1, 1], [1] * 6, [1, 0, 1, 1, 0, 0]]),
        "mask": jnp.float32([1, 0, 1]),
    }


@pytest.fixture(scope="module")
def variables(model, batch):
    shapes = meta.unbox(jax.eval_shape(Language(model).init, jax.random.key(0), batch))
    draw = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.float32(draw.normal(size=leaf.shape) * 0.5), shapes)


@functools.partial(jax.jit, static_argnames="task")
def train_means(task, variables, batch):
    means, collections = task.loss(variables, batch, jax.random.key(0))
    assert not collections
    return means


def log_probabilities(model, variables, batch):
    inputs = (batch[name] for name in ("tokens", "positions", "segments"))
    logits = jax.jit(model.apply)(variables, *inputs)
    logits = np.asarray(logits, np.float64)
    log_z = np.log(np.sum(np.exp(logits), axis=-1))
    return logits - log_z[..., None], log_z


def test_the_table_knows_it():
    assert KINDS["language"] is Language


def test_cross_entropy_of_huge_logits_is_exact():
    logits = jnp.array([[[1000.0, 999.0, -1000.0]]])
    loss, log_z = cross_entropy(logits, jnp.array([[1]]))
    np.testing.assert_allclose(loss, [[1 + math.log1p(math.exp(-1))]], rtol=1e-4)
    np.testing.assert_allclose(log_z, [[1000 + math.log1p(math.exp(-1))]], rtol=1e-6)


def test_loss_weighs_tokens_and_not_rows(model, variables, batch):
    means = train_means(Language(model), variables, batch)
    logp, _ = log_probabilities(model, variables, batch)
    picked = np.take_along_axis(logp, np.asarray(batch["targets"])[..., None], axis=-1)[..., 0]
    weights = np.asarray(batch["weights"])
    assert float(means["loss"].count) == 14
    found = values(means)
    np.testing.assert_allclose(found["loss"], -np.sum(picked * weights) / 14, rtol=1e-5)
    right = np.argmax(logp, -1) == np.asarray(batch["targets"])
    np.testing.assert_allclose(found["accuracy"], np.sum(right * weights) / 14, rtol=1e-6)


def test_z_loss_is_added_and_shown(model, variables, batch):
    plain = train_means(Language(model), variables, batch)
    with_z = train_means(Language(model, z_loss=0.1), variables, batch)
    _, log_z = log_probabilities(model, variables, batch)
    penalty = 0.1 * np.sum(log_z**2 * np.asarray(batch["weights"])) / 14
    np.testing.assert_allclose(values(with_z)["z_loss"], penalty, rtol=1e-4)
    np.testing.assert_allclose(values(with_z)["loss"], values(plain)["loss"] + penalty, rtol=1e-5)
    assert "z_loss" not in plain


def test_metrics_leave_masked_rows_out(model, variables, batch):
    task = Language(model, z_loss=0.1)
    means = jax.jit(task.metrics)(variables, batch)
    assert float(means["loss"].count) == 8
    kept = {name: value[jnp.array([0, 2])] for name, value in batch.items()}
    wanted = train_means(Language(model), variables, kept)
    for name in ("loss", "accuracy"):
        np.testing.assert_allclose(values(means)[name], values(wanted)[name], rtol=1e-5)
    assert means.keys() == {"loss", "accuracy"}


def test_finish_gives_perplexity_and_bits(model):
    finish = Language(model).finish
    finished = finish({"loss": math.log(8.0), "accuracy": 0.5})
    assert finished["perplexity"] == pytest.approx(8.0)
    assert finished["bits_per_token"] == pytest.approx(3.0)
    assert finished["accuracy"] == 0.5
    with_z = finish({"loss": math.log(8.0) + 0.2, "z_loss": 0.2, "cross_entropy": math.log(8.0)})
    assert with_z["perplexity"] == pytest.approx(8.0)
    assert math.isfinite(finish({"loss": 1e6})["perplexity"])


def test_it_learns_a_sequence(model, batch):
    """Gradient steps on one repeated pattern bring the loss from log V to nearly nothing."""
    task = Language(model)
    row = jnp.arange(12) % 4
    lesson = {
        "tokens": row[None, :-1],
        "targets": row[None, 1:],
        "segments": jnp.ones((1, 11), jnp.int32),
        "positions": jnp.arange(11)[None],
        "weights": jnp.ones((1, 11)),
    }
    variables = meta.unbox(jax.jit(task.init)(jax.random.key(0), lesson))

    def loss(variables):
        return values(task.loss(variables, lesson, jax.random.key(0))[0])["loss"]

    def descend(variables, _):
        now, gradient = jax.value_and_grad(loss)(variables)
        return jax.tree.map(lambda v, g: v - 0.3 * g, variables, gradient), now

    _, losses = jax.lax.scan(descend, variables, length=60)
    assert abs(losses[0] - math.log(VOCAB)) < 0.2
    assert losses[-1] < 0.1


def test_a_tokenizer_that_says_more_than_the_model_knows_is_refused():
    with pytest.raises(UsageError, match="the tokenizer has 256 tokens and the model 128"):
        program_of("language", model__vocab=128)


def test_evaluation_says_how_sharp_the_loss_is_around_its_logits(model, variables, batch):
    found = {}
    for epsilon in (0.0, 1e-3, 1e-1):
        task = Language(model, sharpness=epsilon)
        metrics = values(jax.jit(task.metrics)(variables, batch))
        found[epsilon] = task.finish({name: float(value) for name, value in metrics.items()})
    assert "sharpness" not in found[0.0]
    assert found[1e-3]["loss"] == found[0.0]["loss"]
    assert 0 < found[1e-3]["sharpness"] < found[1e-1]["sharpness"]
    rise = found[1e-1]["worst_loss"] - found[0.0]["loss"]
    np.testing.assert_allclose(found[1e-1]["sharpness"], 100 * rise / (1 + found[0.0]["loss"]), rtol=1e-5)
    with pytest.raises(UsageError, match="must be at least 0"):
        Language(model, sharpness=-1.0)
