"""A TokenFormer grows: outputs stay, and training goes on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import meta

from effjax.compress.tokenformer import grow, padded, widen
from effjax.errors import UsageError
from effjax.ffn import MLP, PattentionFFN
from effjax.measure.analytic.shape import DecoderShape
from effjax.mixers import TokenParameterAttention
from effjax.models.lm import LM, DecoderBlock

TOKENS = jax.random.randint(jax.random.key(0), (2, 12), 0, 19)


def small(theta="norm_gelu", **fields):
    mixer = TokenParameterAttention(
        4, slots=6, theta=theta, value_stddev=0.5, causal=True, rotary_base=100.0, rotary_dims=2
    )
    ffn = PattentionFFN(10, theta=theta, value_stddev=0.5)
    return LM(DecoderBlock(mixer, ffn, norm="layer_plain"), 19, 16, 2, tied=True, last_norm="layer", **fields)


@functools.partial(jax.jit, static_argnames="model")
def initial(model):
    params = meta.unbox(model.init(jax.random.key(1), TOKENS))["params"]
    return {**params, "embedding": params["embedding"] * 50}


@functools.partial(jax.jit, static_argnames="model")
def apply(model, params):
    return model.apply({"params": params}, TOKENS)


@functools.partial(jax.jit, static_argnames="model")
def step(model, tokens, caches, params):
    return model.apply({"params": params}, tokens, caches, method="step")


@functools.partial(jax.jit, static_argnames="model")
def grown_to(model, params):
    return grow(model, params, jax.random.key(2), TOKENS)


@functools.partial(jax.jit, static_argnames="model")
def loss(params, model):
    logits = model.apply({"params": params}, TOKENS[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS[:, 1:]).mean()


@pytest.mark.parametrize("theta", ["norm_gelu", "gelu_norm"])
def test_growth_keeps_the_logits(theta):
    model, params = small(theta), initial(small(theta))
    before = apply(model, params)
    assert np.ptp(before) > 1
    # Twice, as from 124M to 354M to 757M.
    for slots, hidden, output in [(9, 31, 6), (20, 40, 11)]:
        model = widen(model, slots, hidden, output)
        params = grown_to(model, params)
        np.testing.assert_allclose(apply(model, params), before, rtol=2e-5, atol=2e-5)
    sizes = {leaf.shape for leaf in jax.tree.leaves(params["blocks"])}
    assert sizes == {(2, 16, 20), (2, 20, 4, 4), (2, 4, 4, 11), (2, 11, 16), (2, 16, 40), (2, 40, 16)}
    # The same with tau = sqrt(n) of the new n is another function.
    mixer = model.block.mixer.clone(scale_slots=None, output_scale_slots=None)
    free = model.clone(block=model.block.clone(mixer=mixer, ffn=model.block.ffn.clone(scale_slots=None)))
    assert np.abs(apply(free, params) - before).max() > 1e-2


def test_training_goes_on_where_it_was():
    optimizer = optax.adamw(3e-3)

    @functools.partial(jax.jit, static_argnames="model")
    def train(params, state, model):
        value, slope = jax.value_and_grad(loss)(params, model)
        update, state = optimizer.update(slope, state, params)
        return value, slope, optax.apply_updates(params, update), state

    model = small()
    params = initial(model)
    state = jax.jit(optimizer.init)(params)
    losses = []
    for _ in range(10):
        value, _, params, state = train(params, state, model)
        losses.append(float(value))
    big = widen(model, 12, 24)
    grown = grown_to(big, params)
    moments = padded(state, jax.eval_shape(optimizer.init, grown))
    value, slope, after, _ = train(grown, moments, big)
    assert value == pytest.approx(float(loss(params, model)), rel=1e-5)
    assert value < losses[-1] < losses[0]
    # What was there moves on as it would have, but for values: new keys see them from the first step on.
    _, _, alone, _ = train(params, state, model)
    query = lambda tree: tree["blocks"]["mixer"]["query"]["keys"]["kernel"]
    np.testing.assert_allclose(query(after)[..., :6], query(alone), rtol=1e-3, atol=1e-5)
    assert np.abs(query(slope)[..., 6:]).min() > 0
    held = moments[0].mu["blocks"]["ffn"]["pattention"]["values"]["kernel"]
    assert held.shape == (2, 24, 16)
    assert not held[:, 10:].any()
    np.testing.assert_array_equal(
        held[:, :10], state[0].mu["blocks"]["ffn"]["pattention"]["values"]["kernel"]
    )
    assert int(moments[0].count) == 10


def test_cached_decoding_equals_the_whole():
    model, params = small(), initial(small())
    caches, logits = model.init_cache(2, 12), []
    for start, stop in [(0, 5), (5, 6), (6, 7), (7, 12)]:
        new, caches = step(model, TOKENS[:, start:stop], caches, params)
        logits.append(new)
    np.testing.assert_allclose(jnp.concatenate(logits, 1), apply(model, params), rtol=1e-4, atol=1e-4)


def test_a_layer_counts_its_tokens():
    params = initial(small())["blocks"]
    per_layer = sum(leaf.size for leaf in jax.tree.leaves(params)) / 2
    assert per_layer == 4 * 2 * 6 * 16 + 2 * 10 * 16  # norms have none


def test_no_closed_form_takes_it_for_attention():
    block = small().block.clone(ffn=MLP())
    with pytest.raises(UsageError, match="no closed form for TokenParameterAttention"):
        DecoderShape.of(small().clone(block=block))


def test_bad_requests_are_named():
    with pytest.raises(UsageError, match="fewer than 6, 6 and 10"):
        widen(small(), 5, 10)
    with pytest.raises(UsageError, match="softmax gives weight"):
        widen(small("softmax"), 8, 12)
    with pytest.raises(UsageError, match="only a TokenFormer grows"):
        widen(LM(DecoderBlock(TokenParameterAttention(4, slots=2), MLP()), 19, 16, 3), 8, 12)
    with pytest.raises(UsageError, match="a/b has shape"):
        padded({"a": {"b": np.zeros(3)}}, {"a": {"b": np.zeros(2)}})
    with pytest.raises(UsageError, match="say how many parameter tokens"):
        TokenParameterAttention(4)
    with pytest.raises(UsageError, match="no biases"):
        TokenParameterAttention(4, slots=2, qkv_bias=True)
