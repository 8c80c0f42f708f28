import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from configs.language import lm as config_file
from effjax import models
from effjax.config import build_kind
from effjax.errors import UsageError
from effjax.ffn import Gated
from effjax.mixers import Attention
from effjax.models.lm import LM, DecoderBlock

VOCAB = 23


def small(**fields):
    mixer = Attention(
        4, kv_heads=2, qkv_bias=False, out_bias=False, qk_norm=True, rotary_base=100.0, causal=True
    )
    return LM(DecoderBlock(mixer, Gated(40)), vocab=VOCAB, dim=32, depth=3, **fields)


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(0), (2, 10), 0, VOCAB)


@pytest.fixture(scope="module")
def variables(tokens):
    shapes = meta.unbox(jax.eval_shape(small().init, jax.random.key(1), tokens))
    draw = np.random.default_rng(2)
    return jax.tree.map(lambda leaf: jnp.float32(draw.normal(size=leaf.shape) * 0.3), shapes)


@functools.partial(jax.jit, static_argnames="model")
def apply(model, variables, tokens, positions=None, segments=None):
    return model.apply(variables, tokens, positions, segments)


@functools.partial(jax.jit, static_argnames="model")
def step(model, variables, tokens, caches, positions=None):
    return model.apply(variables, tokens, caches, positions, method="step")


@pytest.mark.parametrize(
    ("variant", "parameters"), [("125m", 124_635_456), ("1b", 1_235_814_400), ("8b", 8_030_261_248)]
)
def test_published_parameter_counts(variant, parameters):
    model = build_kind(models.KINDS, config_file.get_config(variant).model, "config.model")
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters


def test_every_parameter_names_its_axes(tokens):
    boxed = jax.eval_shape(small().init, jax.random.key(0), tokens)["params"]
    for leaf in jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, meta.AxisMetadata)):
        assert isinstance(leaf, meta.AxisMetadata)
        assert len(leaf.names) == leaf.value.ndim
    assert boxed["embedding"].names == boxed["head"].names == ("vocab", "embed")
    assert boxed["blocks"]["mixer"]["query"]["kernel"].names == ("layers", "embed", "heads", "head_dim")


def test_the_past_does_not_see_the_future(tokens, variables):
    changed = tokens.at[:, 6].set((tokens[:, 6] + 1) % VOCAB)
    before, after = (apply(small(), variables, t) for t in (tokens, changed))
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert np.abs(before - after)[:, 6:].max(axis=(0, 2)).min() > 1e-3  # and every later place does


def test_packed_documents_equal_separate_ones(tokens, variables):
    packed = tokens  # both rows hold documents of 4 and 5 tokens, then padding
    segments = jnp.array([[1] * 4 + [2] * 5 + [0]] * 2)
    positions = jnp.array([[*range(4), *range(5), 0]] * 2)
    together = apply(small(), variables, packed, positions, segments)
    first = apply(small(), variables, tokens)[:, :4]
    second = apply(small(), variables, jnp.roll(tokens, -4, axis=1))[:, :5]
    np.testing.assert_allclose(together[:, :4], first, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(together[:, 4:9], second, rtol=1e-5, atol=1e-5)
    # The mask is what keeps them apart.
    assert np.abs(apply(small(), variables, packed)[:, 4:9] - second).max() > 1e-3


def in_steps(variables, tokens, positions, sizes):
    """Logits of pieces of these sizes, one after another through caches."""
    caches, logits = small().init_cache(2, 12), []
    for cut, size in zip(np.cumsum((0, *sizes)), sizes, strict=False):
        piece = slice(int(cut), int(cut) + size)
        new, caches = step(
            small(), variables, tokens[:, piece], caches, None if positions is None else positions[:, piece]
        )
        logits.append(new)
    return jnp.concatenate(logits, axis=1)


@pytest.mark.parametrize("sizes", [(1,) * 10, (6, 1, 1, 2)])
def test_cached_decoding_equals_the_whole(tokens, variables, sizes):
    whole = apply(small(), variables, tokens)
    assert np.abs(whole).max() > 1.0
    np.testing.assert_allclose(in_steps(variables, tokens, None, sizes), whole, rtol=1e-5, atol=1e-5)


def test_left_padding_is_never_seen(tokens, variables):
    # The second text is 6 tokens long and stands behind 4 tokens of padding.
    positions = jnp.stack([jnp.arange(10), jnp.arange(10) - 4])
    logits = in_steps(variables, tokens.at[1, :4].set(7), positions, (6, 1, 1, 1, 1))
    np.testing.assert_allclose(logits[0], apply(small(), variables, tokens)[0], rtol=1e-5, atol=1e-5)
    alone = apply(small(), variables, jnp.roll(tokens, -4, axis=1))[1, :6]
    np.testing.assert_allclose(logits[1, 4:], alone, rtol=1e-5, atol=1e-5)


def test_a_tied_head_is_the_embedding(tokens, variables):
    params = dict(variables["params"])
    params["head"] = params["embedding"]
    untied = apply(small(), {"params": params}, tokens)
    del params["head"]
    tied = small(tied=True)
    np.testing.assert_array_equal(apply(tied, {"params": params}, tokens), untied)
    assert "head" not in jax.eval_shape(tied.init, jax.random.key(0), tokens)["params"]


def test_logits_are_float32_sums_in_bfloat16(tokens, variables):
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables)
    logits = apply(small(), low, tokens)
    assert logits.dtype == jnp.float32
    assert not np.array_equal(logits, logits.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_allclose(logits, apply(small(), variables, tokens), atol=0.5)


def test_bad_requests_are_named(tokens, variables):
    with pytest.raises(UsageError, match="10 tokens is longer than the 9"):
        small(max_length=9).init(jax.random.key(0), tokens)
    with pytest.raises(UsageError, match="10 tokens is longer than the 9"):
        small(max_length=9).init_cache(1, 10)
    assert np.isnan(apply(small(), variables, jnp.full((1, 2), VOCAB))).all()
