"""Losses, biases, scores and noise of a mixture's router."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.config import build_kind
from effjax.errors import UsageError
from effjax.ffn import Mixture
from effjax.ffn.balance import load_balance, nudged, router_z
from effjax.ffn.router import Cosine
from effjax.ffn.routing import choose
from effjax.mixers import Attention
from effjax.models import KINDS
from effjax.models.lm import LM, DecoderBlock
from effjax.train.tasks import Classification, Language

X = jax.random.normal(jax.random.key(0), (3, 8, 6))


def made(**fields):
    mixture = Mixture(**{**dict(experts=5, chosen=2, hidden=7), **fields})
    return mixture, meta.unbox(mixture.init(jax.random.key(1), X))


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_load_balance_is_one_where_routing_is_even(scores):
    index = jnp.array([[0, 1], [2, 3], [4, 0], [1, 2], [3, 4]])
    assert load_balance(jnp.zeros((5, 5)), index, scores) == pytest.approx(1.0)
    peaked = jnp.zeros((5, 5)).at[:, 0].set(50.0)
    assert load_balance(peaked, jnp.zeros((5, 1), jnp.int32)) == pytest.approx(5.0)


def test_router_z_is_the_squared_logarithm():
    logits = jax.random.normal(jax.random.key(2), (7, 4)) * 3
    wanted = np.mean(np.log(np.exp(np.float64(logits)).sum(-1)) ** 2)
    assert router_z(logits) == pytest.approx(wanted, rel=1e-5)


def test_losses_are_sown_in_training_with_their_weights():
    mixture, params = made(balance=0.5, z_loss=0.1)
    apply = jax.jit(lambda train: mixture.apply(params, X, train=train, mutable=["losses"]), static_argnums=0)
    sown = apply(True)[1]["losses"]
    logits = X.reshape(-1, 6) @ params["params"]["router"]["kernel"]
    index = choose(logits, 2, True)[1]
    np.testing.assert_allclose(sown["load_balance"], [0.5 * load_balance(logits, index)], rtol=1e-5)
    np.testing.assert_allclose(sown["router_z"], [0.1 * router_z(logits)], rtol=1e-5)
    assert "losses" not in apply(False)[1]


def test_a_bias_moves_the_choice_and_not_the_weights():
    logits = jax.random.normal(jax.random.key(3), (6, 4))
    weights, index = choose(logits, 2, False, "sigmoid", jnp.array([0.0, 9.0, 9.0, 0.0]))
    np.testing.assert_array_equal(np.sort(index, -1), [[1, 2]] * 6)
    np.testing.assert_allclose(weights, np.take_along_axis(jax.nn.sigmoid(logits), index, -1), rtol=1e-6)


def test_a_nudge_goes_to_whoever_has_too_little():
    index = jnp.array([[0, 1], [0, 1], [0, 2], [0, 3]])  # loads 4, 2, 1, 1 of a mean of 2
    np.testing.assert_allclose(nudged(jnp.zeros(4), index, 0.25), [-0.25, 0.0, 0.25, 0.25])


def test_nudges_balance_a_skewed_router():
    logits = jax.random.normal(jax.random.key(4), (512, 8)) + 2.0 * jnp.arange(8)[None] / 8

    def step(bias, _):
        index = choose(logits, 2, True, "sigmoid", bias)[1]
        return nudged(bias, index, 0.01), jnp.max(jnp.bincount(index.reshape(-1), length=8)) / 128

    _, worst = jax.lax.scan(step, jnp.zeros(8), length=200)
    assert worst[0] > 1.8
    assert worst[-10:].max() < 1.15


def toy(**fields):
    mixture = Mixture(4, 2, 12, **fields)
    return LM(DecoderBlock(Attention(2, rotary_base=100.0, causal=True), mixture), vocab=11, dim=16, depth=2)


BATCH = {
    "tokens": jax.random.randint(jax.random.key(0), (2, 9), 0, 11),
    "targets": jax.random.randint(jax.random.key(1), (2, 9), 0, 11),
    "segments": jnp.ones((2, 9), jnp.int32),
    "positions": jnp.broadcast_to(jnp.arange(9)[None], (2, 9)),
    "weights": jnp.ones((2, 9)),
    "mask": jnp.ones((2,)),
}


def test_a_task_adds_the_losses_and_carries_the_bias():
    task = Language(toy(balance=0.3, z_loss=0.01, balance_rate=0.125))
    variables = meta.unbox(jax.jit(task.init)(jax.random.key(0), BATCH))
    assert set(variables) == {"params", "routing"}
    bias = variables["routing"]["blocks"]["ffn"]["bias"]
    np.testing.assert_array_equal(bias, np.zeros((2, 4)))
    means, collections = jax.jit(task.loss)(variables, BATCH, jax.random.key(1))
    assert set(collections) == {"routing"}
    moved = collections["routing"]["blocks"]["ffn"]["bias"]
    assert set(np.unique(moved)) <= {-0.125, 0.0, 0.125}
    assert np.abs(moved).max() > 0
    found = {name: float(mean.value()) for name, mean in means.items()}
    parts = found["cross_entropy"] + found["load_balance"] + found["router_z"]
    assert found["loss"] == pytest.approx(parts, rel=1e-6)
    assert found["load_balance"] >= 0.9 * 2 * 0.3  # of two layers, at least about the weight each
    finished = task.finish(found)
    assert finished["perplexity"] == pytest.approx(np.exp(found["cross_entropy"]), rel=1e-6)
    assert set(jax.jit(task.metrics)(variables, BATCH)) == {"loss", "accuracy"}


def test_a_classifier_adds_them_too():
    block = dict(
        mixer=dict(kind="attention", heads=2), ffn=dict(kind="mixture", experts=3, chosen=1, hidden=4)
    )
    block["ffn"]["balance"] = 0.5
    section = dict(kind="vit", patch=4, dim=8, depth=2, classes=3, pool="mean", block=block)
    task = Classification(build_kind(KINDS, section, "model"))
    batch = {"image": jax.random.normal(jax.random.key(0), (2, 8, 8, 1)), "label": jnp.array([0, 2])}
    variables = meta.unbox(jax.jit(task.init)(jax.random.key(0), batch))
    means, collections = jax.jit(task.loss)(
        variables, task.prepare(batch, jax.random.key(1)), jax.random.key(2)
    )
    assert not collections
    assert means["load_balance"].value() > 0.9
    assert means["loss"].value() > means["load_balance"].value()


def test_noise_is_of_training_alone():
    mixture, params = made(noise=2.0, chosen=5)
    keys = {"dropout": jax.random.key(3)}
    apply = jax.jit(
        lambda train, drawn: mixture.apply(params, X, train=train, rngs=keys if drawn else {}),
        static_argnums=(0, 1),
    )
    quiet = apply(False, False)
    assert np.abs(apply(True, True) - quiet).max() > 1e-3
    np.testing.assert_allclose(apply(False, True), quiet, atol=1e-6)
    np.testing.assert_allclose(apply(True, False), quiet, atol=1e-6)  # nobody gave a key


@pytest.mark.parametrize(("noise", "deviation"), [(2.0, 0.4), ("learned", np.log(2.0))])
def test_noise_is_as_wide_as_it_says(noise, deviation):
    """Seen in the weights of all experts, which are the softmax of logits that are noise alone."""
    tokens = jnp.zeros((4000, 6))
    mixture = Mixture(5, 5, 3, noise=noise, normalised=False)
    params = meta.unbox(mixture.init(jax.random.key(1), tokens))
    _, sown = mixture.apply(
        params, tokens, train=True, rngs={"dropout": jax.random.key(0)}, mutable=["intermediates"]
    )
    (routes,) = sown["intermediates"]["routes"]
    logs = np.log(np.asarray(routes.weight)[np.argsort(routes.token, kind="stable")].reshape(4000, 5))
    centred = logs - logs.mean(1, keepdims=True)
    assert centred.std() * np.sqrt(5 / 4) == pytest.approx(deviation, rel=0.03)


def test_the_cosine_router_sees_angles():
    tokens = jax.random.normal(jax.random.key(0), (7, 6))
    router = Cosine(width=4, temperature=0.25)
    variables = meta.unbox(router.init(jax.random.key(1), tokens, 3))
    logits = router.apply(variables, tokens, 3)
    p = variables["params"]
    x = np.asarray(tokens) @ p["project"]["kernel"]
    cosines = x @ p["directions"]
    cosines /= np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(p["directions"], axis=0)[None]
    np.testing.assert_allclose(logits, cosines / 0.25, rtol=1e-4)
    np.testing.assert_allclose(router.apply(variables, 9 * tokens, 3), logits, rtol=1e-4)
    cold = {"params": {**p, "log_scale": jnp.array([99.0])}}
    np.testing.assert_allclose(router.apply(cold, tokens, 3), cosines / 0.01, rtol=1e-3)


def test_a_language_model_refuses_experts_that_choose():
    with pytest.raises(UsageError, match="look at later ones"):
        toy(choice="expert")
