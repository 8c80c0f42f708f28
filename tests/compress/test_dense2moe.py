"""Experts made of the neurons of trained FFNs: exact where all are on, and what is counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.compress.dense2moe import (
    active_share,
    importance,
    magnitude,
    mixture_of,
    pruned,
    to_experts,
)
from effjax.errors import UsageError
from effjax.ffn.mixture import Mixture, load_balance
from effjax.ffn.mlp import MLP
from effjax.mixers.attention import Attention
from effjax.models.blocks.adaln import DiTBlock
from effjax.models.dit import DiT

KEY = jax.random.key(4)


def dit(**changes):
    block = DiTBlock(mixer=Attention(heads=2), ffn=MLP(hidden=16, activation="gelu_tanh"))
    return DiT(**(dict(block=block, patch=2, dim=8, depth=2, classes=3, frequencies=6) | changes))


def inputs(batch=2):
    x = np.random.default_rng(5).normal(size=(batch, 8, 8, 1))
    return jnp.float32(x), jnp.linspace(1.0, 900.0, batch), jnp.arange(batch) % 4


@pytest.fixture(scope="module")
def params():
    shapes = meta.unbox(jax.eval_shape(dit().init, jax.random.key(0), *inputs()))["params"]
    draw = np.random.default_rng(9)
    return jax.tree.map(lambda s: jnp.asarray(0.3 * draw.normal(size=s.shape), s.dtype), shapes)


SCORES = jnp.float32(np.random.default_rng(2).uniform(size=(2, 16)))


def run(model, params):
    return jax.jit(lambda p, *a: model.apply({"params": p}, *a))(params, *inputs())


def test_all_experts_on_are_the_dense_network(params):
    model, made = to_experts(dit(), params, SCORES, KEY, experts=4, chosen=4)
    shapes = meta.unbox(jax.eval_shape(model.init, KEY, *inputs()))["params"]
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, shapes)
    router = made["blocks"]["ffn"]["router"]
    made["blocks"]["ffn"]["router"] = jax.tree.map(jnp.zeros_like, router)
    np.testing.assert_allclose(run(model, made), run(dit(), params), rtol=1e-5, atol=1e-5)


def test_the_best_neurons_are_shared_and_the_others_dealt_out(params):
    scores = jnp.tile(jnp.arange(16, 0, -1, dtype=jnp.float32)[None], (2, 1))
    _, made = to_experts(dit(), params, scores, KEY, experts=4, chosen=2)
    ffn, dense = made["blocks"]["ffn"], params["blocks"]["ffn"]
    np.testing.assert_array_equal(ffn["shared"]["expand"]["kernel"], dense["expand"]["kernel"][..., :4])
    np.testing.assert_array_equal(ffn["shared"]["contract"]["bias"], dense["contract"]["bias"])
    np.testing.assert_array_equal(ffn["contract_kernel"][:, 1], dense["contract"]["kernel"][:, 5::4])
    np.testing.assert_array_equal(ffn["expand_bias"][:, 3], dense["expand"]["bias"][:, 7::4])


def test_importance_is_the_change_of_a_linear_loss(params):
    way = jnp.float32(np.random.default_rng(3).normal(size=(2, 8, 8, 2)))

    def loss(p, batch):
        return jnp.sum(batch * run(dit(), p))

    got = importance(loss, params, [way, -2 * way])
    # Behind the last FFN stand a norm and a projection: to first order, by a small step of each neuron.
    step, kernel = 1e-3, params["blocks"]["ffn"]["contract"]["kernel"]
    for layer, neuron in ((0, 3), (1, 0), (1, 11)):

        def scaled(factor, layer=layer, neuron=neuron):
            ffn = params["blocks"]["ffn"]
            changed = kernel.at[layer, neuron].multiply(factor)
            ffn = {**ffn, "contract": {**ffn["contract"], "kernel": changed}}
            return loss({**params, "blocks": {**params["blocks"], "ffn": ffn}}, way)

        slope = (scaled(1 + step) - scaled(1 - step)) / (2 * step)
        np.testing.assert_allclose(got[layer, neuron], 1.5 * abs(slope), rtol=2e-2, atol=2e-2)


def test_neurons_left_out_change_a_linear_loss_by_their_importance():
    """sum_n a_nf dL/da_nf is the loss that neuron f makes, where the loss is linear in what the FFN gives."""
    draw = np.random.default_rng(1)
    x, way = jnp.float32(draw.normal(size=(2, 5, 3)))
    held = jax.tree.map(
        lambda s: jnp.float32(draw.normal(size=s.shape)),
        meta.unbox(jax.eval_shape(MLP(hidden=6).init, KEY, x))["params"],
    )
    kernel = held["contract"]["kernel"]

    def loss(kernel):
        ffn = {**held, "contract": {**held["contract"], "kernel": kernel}}
        return jnp.sum(way * MLP(hidden=6).apply({"params": ffn}, x))

    score = jnp.sum(kernel * jax.grad(loss)(kernel), axis=-1)
    without = jnp.stack([loss(kernel) - loss(kernel.at[f].set(0)) for f in range(6)])
    np.testing.assert_allclose(score, without, rtol=1e-4, atol=1e-4)


def test_the_papers_experts_have_three_eighths_of_the_ffn_active():
    ffn = mixture_of(MLP(ratio=4.0), 1152)
    assert (ffn.shared, ffn.hidden, ffn.experts, ffn.chosen) == (1152, 288, 12, 2)
    assert active_share(ffn) == 0.375
    shapes = meta.unbox(jax.eval_shape(ffn.init, KEY, jnp.zeros((1, 1152))))["params"]
    size = sum(leaf.size for leaf in jax.tree.leaves(shapes)) - shapes["router"]["kernel"].size
    assert size == 2 * 1152 * 4608 + 4608 + 1152


def test_pruning_keeps_the_best_neurons(params):
    scores = magnitude(params)
    kernel = params["blocks"]["ffn"]["contract"]["kernel"]
    into = params["blocks"]["ffn"]["expand"]["kernel"]
    np.testing.assert_allclose(
        scores[1, 5], np.linalg.norm(into[1, :, 5]) * np.linalg.norm(kernel[1, 5]), rtol=1e-5
    )
    model, kept = pruned(dit(), params, scores, 16)
    np.testing.assert_allclose(run(model, kept), run(dit(), params), rtol=1e-5, atol=1e-5)
    model, kept = pruned(dit(), params, scores, 5)
    silent = jax.vmap(lambda k, s: jnp.where((s >= jnp.sort(s)[-5])[:, None], k, 0))(kernel, scores)
    ffn = params["blocks"]["ffn"]
    ffn = {**ffn, "contract": {**ffn["contract"], "kernel": silent}}
    zeroed = {**params, "blocks": {**params["blocks"], "ffn": ffn}}
    np.testing.assert_allclose(run(model, kept), run(dit(), zeroed), rtol=1e-5, atol=1e-5)


def test_load_balance_is_least_where_routing_is_even():
    def at(logits):
        return load_balance(logits, jax.lax.top_k(logits, 1)[1])

    even = 5 * jnp.tile(jnp.eye(4), (3, 1))
    np.testing.assert_allclose(at(even), 1, rtol=1e-6)
    np.testing.assert_allclose(at(jnp.tile(50 * jnp.eye(4)[:1], (12, 1))), 4, rtol=1e-6)
    draw = np.random.default_rng(0)
    # A liking that all tokens share moves both factors the same way.
    for _ in range(5):
        assert at(even + jnp.tile(jnp.float32(draw.normal(0, 4, (1, 4))), (12, 1))) > 1


def test_the_balance_is_sown_in_training_alone():
    ffn, x = Mixture(4, 2, 3, gated=False, balance=0.5), jnp.ones((5, 2))
    held = meta.unbox(ffn.init(KEY, x))
    assert set(held) == {"params"}
    _, told = ffn.apply(held, x, train=True, mutable=["losses"])
    assert told["losses"]["load_balance"][0] > 0
    _, told = ffn.apply(held, x, mutable=["losses"])
    assert not told


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mixture_of(MLP(hidden=16), 4, experts=5), "cannot be dealt out to experts=5"),
        (lambda: importance(lambda p, b: 0.0, {}, []), "at least one"),
        (lambda: Mixture(4, 2, 3, use_bias=True), "gated experts have no biases"),
        (lambda: pruned(dit(), {}, SCORES, 0), "hidden=0"),
    ],
)
def test_wrong_requests(make, message):
    with pytest.raises(UsageError, match=message):
        make()
