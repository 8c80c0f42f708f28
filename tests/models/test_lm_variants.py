"""The fields that make other language models out of the Llama family."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax import models
from effjax.config import build_kind
from effjax.ffn import MLP, Gated, Mixture
from effjax.ffn.router import Cosine
from effjax.measure.analytic.shape import DecoderShape
from effjax.mixers import Attention, Mamba
from effjax.mixers.rotary import Llama3
from effjax.models.lm import LM, DecoderBlock, Layer

VOCAB = 19
TOKENS = jax.random.randint(jax.random.key(0), (2, 12), 0, VOCAB)
ROTARY = dict(heads=4, kv_heads=2, causal=True, rotary_base=100.0)
MIXED = (Layer(3, 100.0), Layer(None, 1e4, Llama3(2.0, 1.0, 4.0, 8)), Layer(5))

VARIANTS = {
    "gpt2": LM(
        DecoderBlock(Attention(4, causal=True), MLP(), norm="layer"),
        VOCAB,
        16,
        3,
        tied=True,
        position_table=20,
        position_offset=2,
        head_bias=True,
    ),
    "last_norm": LM(
        DecoderBlock(Attention(**ROTARY), MLP(), norm="layer_plain"), VOCAB, 16, 3, last_norm="layer"
    ),
    "after": LM(
        DecoderBlock(Attention(**ROTARY, qk_norm=True, qk_norm_over="width"), Gated(20), norm_at="after"),
        VOCAB,
        16,
        3,
    ),
    "both": LM(
        DecoderBlock(
            Attention(**ROTARY, logit_cap=2.0, scale=0.3, window=4),
            Gated(20),
            norm="rms_offset",
            norm_at="both",
            residual_scale=0.5,
        ),
        VOCAB,
        16,
        3,
        embedding_scale=4.0,
        logit_cap=3.0,
        logit_scale=0.5,
    ),
    "one_norm": LM(
        DecoderBlock(
            Attention(**ROTARY, rotary_dims=2, rotary_pairs="neighbours"),
            MLP(),
            norm="layer_no_bias",
            parallel="one_norm",
        ),
        VOCAB,
        16,
        3,
    ),
    "two_norms": LM(
        DecoderBlock(
            Attention(**ROTARY, clip=0.5, qk_norm=True, qk_norm_over="each_head"), MLP(), parallel="two_norms"
        ),
        VOCAB,
        16,
        3,
    ),
    "mixed_layers": LM(DecoderBlock(Attention(**ROTARY), Gated(20)), VOCAB, 16, 3, layers=MIXED),
    "mixture": LM(DecoderBlock(Attention(**ROTARY, window=4), Mixture(4, 2, 12)), VOCAB, 16, 2),
    "biased_mixture": LM(
        DecoderBlock(
            Attention(**ROTARY),
            Mixture(
                4,
                2,
                12,
                router=Cosine(8),
                scores="sigmoid",
                balance_rate=0.1,
                capacity=1.0,
                eval_capacity=2.0,
            ),
        ),
        VOCAB,
        16,
        2,
    ),
    "mamba": LM(DecoderBlock(Mamba(state=4, chunk=5), None), VOCAB, 16, 2, tied=True),
    "hybrid": LM(DecoderBlock(Mamba(state=4), Gated(20)), VOCAB, 16, 2),
}


CLOSED = ["gpt2", "last_norm", "after", "one_norm", "two_norms"]


@functools.cache
def variables_of(name):
    shapes = meta.unbox(jax.eval_shape(VARIANTS[name].init, jax.random.key(1), TOKENS))
    draw = np.random.default_rng(2)
    return jax.tree.map(lambda leaf: jnp.float32(draw.normal(size=leaf.shape) * 0.4), shapes)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_causal_and_the_same_in_steps(name):
    model, variables = VARIANTS[name], variables_of(name)
    apply = jax.jit(model.apply)
    whole = apply(variables, TOKENS)
    changed = apply(variables, TOKENS.at[:, 7].set((TOKENS[:, 7] + 1) % VOCAB))
    np.testing.assert_allclose(changed[:, :7], whole[:, :7], atol=1e-6)
    assert np.abs(changed - whole)[:, 7].max() > 1e-3
    # The second text stands behind four tokens of padding.
    positions = jnp.stack([jnp.arange(12), jnp.arange(12) - 4])
    step = jax.jit(functools.partial(model.apply, method="step"))
    caches, pieces = model.init_cache(2, 12), []
    for start, stop in ((0, 6), (6, 7), (7, 9), (9, 12)):
        part = slice(start, stop)
        logits, caches = step(variables, TOKENS[:, part], caches, positions[:, part])
        pieces.append(logits)
    steps = jnp.concatenate(pieces, axis=1)
    np.testing.assert_allclose(steps[0], whole[0], rtol=1e-4, atol=1e-4)
    alone = apply(variables, jnp.roll(TOKENS, -4, axis=1))[1, :8]
    np.testing.assert_allclose(steps[1, 4:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "both", "mixed_layers", "mamba"])
def test_packed_documents_equal_separate_ones(name):
    model, variables = VARIANTS[name], variables_of(name)
    apply = jax.jit(model.apply)
    segments = jnp.array([[1] * 5 + [2] * 6 + [0]] * 2)
    positions = jnp.array([[*range(5), *range(6), 0]] * 2)
    packed = apply(variables, TOKENS, positions, segments)
    second = apply(variables, jnp.roll(TOKENS, -5, axis=1))[:, :6]
    np.testing.assert_allclose(packed[:, 5:11], second, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CLOSED)
def test_the_closed_form_counts_every_parameter(name):
    model = VARIANTS[name]
    counted = sum(leaf.size for leaf in jax.tree.leaves(variables_of(name)))
    assert DecoderShape.of(model).parameters == counted


@pytest.mark.slow
def test_a_window_hides_what_lies_before_it():
    model = LM(DecoderBlock(Attention(**ROTARY, window=4), Gated(20)), VOCAB, 16, 1)
    variables = meta.unbox(model.init(jax.random.key(0), TOKENS))
    apply = jax.jit(model.apply)
    moved = np.abs(apply(variables, TOKENS.at[:, 2].add(1)) - apply(variables, TOKENS)).max((0, 2))
    assert (moved[2:6] > 1e-4).all()
    np.testing.assert_array_equal(moved[6:], 0.0)
    # The same window as data of the layers.
    layers = model.clone(
        block=model.block.clone(mixer=model.block.mixer.clone(window=None)), layers=(Layer(4, 100.0),)
    )
    np.testing.assert_allclose(jax.jit(layers.apply)(variables, TOKENS), apply(variables, TOKENS), atol=1e-5)


@pytest.mark.slow
def test_layers_that_turn_nothing_see_no_order():
    model = LM(
        DecoderBlock(Attention(**ROTARY), Gated(20)), VOCAB, 16, 1, layers=(Layer(), Layer(rotary_base=9.0))
    )
    deep = model.clone(depth=2)
    variables = meta.unbox(deep.init(jax.random.key(0), TOKENS))
    one = jax.tree.map(lambda leaf: leaf[:1], variables["params"]["blocks"])
    shallow = {"params": variables["params"] | {"blocks": one}}
    swapped = TOKENS.at[:, :2].set(TOKENS[:, 1::-1])
    # Of the last place, whose past is only reordered.
    for tried, params, same in ((model, shallow, True), (deep, variables, False)):
        a, b = (jax.jit(tried.apply)(params, t)[:, -1] for t in (TOKENS, swapped))
        assert np.allclose(a, b, atol=1e-5) == same


def test_a_config_says_all_of_it():
    section = dict(
        kind="lm",
        vocab=9,
        dim=8,
        depth=2,
        block=dict(
            mixer=dict(kind="attention", heads=2, causal=True),
            ffn=dict(kind="mixture", experts=3, chosen=1, hidden=8),
            norm="layer",
            norm_at="both",
        ),
        layers=(dict(window=3), dict(rotary_base=10.0, rotary_scaling=dict(kind="linear", factor=2.0))),
    )
    model = build_kind(models.KINDS, section, "config.model")
    assert model.layers[0].window == 3
    assert model.layers[1].rotary_scaling.factor == 2.0
    mamba = dict(mixer=dict(kind="mamba"), ffn=None)
    assert build_kind(models.KINDS, section | dict(block=mamba), "config.model").block.ffn is None
