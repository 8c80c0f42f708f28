"""Scaled norms: what they do to the stream, and the ordinary model that they fold into."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.compress.norm_scaling import folded
from effjax.errors import UsageError
from effjax.ffn import Gated
from effjax.layers.stack import streams
from effjax.mixers import Attention
from effjax.models.lm import LM, DecoderBlock

TOKENS = jax.random.randint(jax.random.key(0), (2, 12), 0, 19)


def lm(depth=3, **fields):
    block = {name: fields.pop(name) for name in ("norm", "norm_at", "parallel") if name in fields}
    mixer = Attention(4, qkv_bias=False, out_bias=False, rotary_base=100.0, causal=True)
    return LM(DecoderBlock(mixer, Gated(40), **block), vocab=19, dim=32, depth=depth, **fields)


@functools.partial(jax.jit, static_argnames="model")
def apply(model, params):
    return model.apply({"params": params}, TOKENS)


def drawn(model):
    params = meta.unbox(jax.jit(model.init)(jax.random.key(1), TOKENS))["params"]
    keys = iter(jax.random.split(jax.random.key(2), 50))
    return jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(next(keys), leaf.shape), params)


@pytest.mark.parametrize(
    "fields",
    [{}, {"norm": "layer"}, {"norm_at": "both"}, {"parallel": "one_norm"}, {"parallel": "two_norms"}],
)
def test_folds_into_the_plain_model(fields):
    model = lm(norm_scaling=True, **fields)
    params = drawn(model)
    plain, smaller = folded(model, params)
    assert not plain.norm_scaling
    expected = apply(model, params)
    np.testing.assert_allclose(apply(plain, smaller), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(np.asarray(apply(plain, params)) - expected).max() > 0.01


def test_the_first_layer_is_as_it_was_and_the_fourth_has_half():
    params = drawn(lm(norm_scaling=True, depth=4))
    _, smaller = folded(lm(norm_scaling=True, depth=4), params)
    for name in ("mixer_norm", "ffn_norm"):
        before, after = params["blocks"][name]["scale"], smaller["blocks"][name]["scale"]
        np.testing.assert_array_equal(after[0], before[0])
        np.testing.assert_allclose(after[3], before[3] / 2, rtol=1e-6)


def test_the_variance_of_the_stream_grows_less_than_linearly():
    """Plain branches add alike; scaled ones add 1 / l of the variance, so that it grows like log l."""
    depth = 16

    def variances(scaled):
        model = lm(norm_scaling=scaled, depth=depth)
        params = meta.unbox(jax.jit(model.init)(jax.random.key(1), TOKENS))["params"]
        sown = model.apply({"params": params}, TOKENS, mutable=["intermediates"])[1]["intermediates"]
        return np.array([np.var(x) for x in streams(sown["blocks"])])

    plain, scaled = variances(False), variances(True)
    np.testing.assert_allclose(plain[1], scaled[1], rtol=1e-5)  # the first layer is the same
    added = np.diff(plain)[depth // 2 :].mean(), np.diff(scaled)[depth // 2 :].mean()
    # Attention and gated perceptron are not linear, so that the share is less than 1 / l and not it.
    assert added[1] < added[0] / 8
    assert scaled[-1] < 0.5 * plain[-1]


def test_decoding_in_steps_equals_the_whole():
    model = lm(norm_scaling=True)
    params = drawn(model)
    caches = model.init_cache(2, 12)
    step = jax.jit(lambda tokens, caches: model.apply({"params": params}, tokens, caches, method="step"))
    first, caches = step(TOKENS[:, :7], caches)
    rest, _ = step(TOKENS[:, 7:], caches)
    np.testing.assert_allclose(jnp.concatenate([first, rest], 1), apply(model, params), atol=1e-4)


def test_what_cannot_be():
    with pytest.raises(UsageError, match="nothing to fold"):
        folded(lm(), {})
    with pytest.raises(UsageError, match="set norm_at to 'before'"):
        lm(norm_scaling=True, norm_at="after")
    shared = lm(norm_scaling=True, shared=(".*",))
    with pytest.raises(UsageError, match="mixer_norm is shared by all layers"):
        folded(shared, drawn(shared))
