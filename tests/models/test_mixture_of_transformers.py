"""Weights for each modality: what is apart, what is common, and that the work is that of one model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from configs.language import mixture_of_transformers as config_file
from effjax import models
from effjax.config import build_kind
from effjax.errors import UsageError
from effjax.ffn import Gated
from effjax.ffn.modal import ModalGated
from effjax.layers.modal import Modalities
from effjax.measure import count
from effjax.mixers import Attention
from effjax.mixers.modal_attention import ModalAttention
from effjax.models.lm import LM, DecoderBlock
from effjax.models.mixture_of_transformers import MixtureOfTransformers, ModalBlock

ATTENTION = dict(heads=4, kv_heads=2, qk_norm=True, rotary_base=100.0, causal=True)
SHAPE = dict(vocab=24, dim=16, depth=2)
# Text below 9, images from there to below 17, speech from there on.
TOKENS = jnp.array([[1, 10, 11, 20, 3, 4, 12, 23, 8, 9], [5, 2, 18, 0, 16, 17, 9, 9, 1, 7]])


def small(modalities=3, norm_at="after", **fields):
    mixer = ModalAttention(**ATTENTION, modalities=modalities)
    block = ModalBlock(mixer, ModalGated(20, modalities), norm_at=norm_at)
    return MixtureOfTransformers(block, **SHAPE, first=(9, 17)[: modalities - 1], **fields)


def dense(norm_at="after"):
    mixer = Attention(**ATTENTION, qkv_bias=False, out_bias=False)
    return LM(DecoderBlock(mixer, Gated(20), norm_at=norm_at), **SHAPE)


@functools.partial(jax.jit, static_argnames="model")
def apply(model, params, tokens=TOKENS):
    return model.apply({"params": params}, tokens)


@functools.partial(jax.jit, static_argnames="model")
def step(model, params, tokens, caches):
    return model.apply({"params": params}, tokens, caches, method="step")


@functools.cache
def drawn(model):
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(1), TOKENS))["params"]
    draw = np.random.default_rng(2)
    return jax.tree.map(lambda leaf: jnp.float32(draw.normal(size=leaf.shape) * 0.4), shapes)


@pytest.mark.parametrize("norm_at", ["before", "after"])
def test_equal_copies_are_the_dense_model(norm_at):
    params = drawn(dense(norm_at))
    copies = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3, axis=1), params["blocks"])
    expected = apply(dense(norm_at), params)
    assert np.ptp(expected) > 1
    found = apply(small(norm_at=norm_at), {**params, "blocks": copies})
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_one_modality_is_the_dense_model():
    params = drawn(dense())
    copy = jax.tree.map(lambda leaf: leaf[:, None], params["blocks"])
    found = apply(small(1), {**params, "blocks": copy})
    np.testing.assert_allclose(found, apply(dense(), params), rtol=1e-5, atol=1e-5)


def test_tokens_meet_the_weights_of_their_own_modality():
    """The FFN of a block against a loop over tokens, each with its own matrices."""
    model = small()
    block = jax.tree.map(lambda leaf: leaf[0], drawn(model)["blocks"])
    x = jnp.float32(np.random.default_rng(3).normal(size=(2, 10, 16)))
    ids = (TOKENS >= 9).astype(int) + (TOKENS >= 17)
    found = model.block.ffn.apply({"params": block["ffn"]}, x, Modalities.of(ids, 3))
    for b, n in np.ndindex(2, 10):
        own = jax.tree.map(lambda leaf: leaf[ids[b, n]], block["ffn"])  # noqa: B023
        expected = Gated(20).apply({"params": own}, x[b, n][None, None])[0, 0]
        np.testing.assert_allclose(found[b, n], expected, rtol=1e-5, atol=1e-5)


def test_the_way_tokens_are_sorted_says_nothing():
    ids = (TOKENS >= 9).astype(int)
    modality = Modalities.of(ids, 2)
    x = jnp.float32(np.random.default_rng(4).normal(size=(2, 10, 16)))
    np.testing.assert_array_equal(modality.restore(modality.sort(x)), x)
    # Another order within the modalities, and the same result.
    order = np.concatenate(
        [np.random.default_rng(5).permutation(np.flatnonzero(ids.ravel() == m)) for m in (0, 1)]
    )
    other = modality.replace(order=jnp.array(order), place=jnp.argsort(jnp.array(order)))
    ffn = ModalGated(20)
    variables = meta.unbox(ffn.init(jax.random.key(0), x, modality))
    np.testing.assert_allclose(
        ffn.apply(variables, x, modality), ffn.apply(variables, x, other), rtol=1e-5, atol=1e-6
    )


@functools.partial(jax.jit, static_argnames="model")
def slopes(model, params, tokens):
    return jax.grad(lambda p: jnp.sum(jnp.sin(model.apply({"params": p}, tokens))))(params)


def test_an_absent_modality_has_no_gradient():
    found = slopes(small(), drawn(small()), jnp.where(TOKENS >= 17, 3, TOKENS))["blocks"]
    for leaf in jax.tree.leaves(found):
        assert not leaf[:, 2].any()
        assert all(np.abs(leaf[:, m]).max() > 0 for m in (0, 1))


def test_text_sees_images_through_the_one_attention():
    before, after = (apply(small(), drawn(small()), t) for t in (TOKENS, TOKENS.at[0, 1].set(13)))
    moved = np.abs(before - after)[0].max(axis=-1)
    assert not moved[0]
    assert (moved[1:] > 1e-4).all()


def test_cached_decoding_equals_the_whole():
    model, params = small(), drawn(small())
    caches, logits = model.init_cache(2, 10), []
    for start, stop in [(0, 6), (6, 7), (7, 8), (8, 9), (9, 10)]:
        new, caches = step(model, params, TOKENS[:, start:stop], caches)
        logits.append(new)
    np.testing.assert_allclose(jnp.concatenate(logits, 1), apply(model, params), rtol=1e-5, atol=1e-5)


def test_the_work_is_that_of_the_dense_model():
    def macs(model):
        return count(lambda p: model.apply({"params": p}, TOKENS), drawn(model)).macs

    assert macs(small()) == macs(dense())
    sizes = {m: sum(leaf.size for leaf in jax.tree.leaves(drawn(small(m)))) for m in (1, 3)}
    common = 2 * 24 * 16 + 16  # two tables and the last norm
    assert sizes[3] - common == 3 * (sizes[1] - common)


@pytest.mark.parametrize(
    ("variant", "millions"),
    [("37m", 37), ("94m", 94), ("443m", 443), ("880m", 880), ("1.5b", 1500), ("7b", 7000)],
)
def test_sizes_are_named_by_the_dense_model_of_the_same_work(variant, millions):
    section = config_file.model(config_file.SIZES[variant])
    section["first"] = ()
    section["block"]["mixer"]["modalities"] = section["block"]["ffn"]["modalities"] = 1
    model = build_kind(models.KINDS, section, "config.model")
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == pytest.approx(millions * 1e6, rel=0.01)


def test_every_parameter_names_its_axes():
    boxed = jax.eval_shape(small().init, jax.random.key(0), TOKENS)["params"]
    for leaf in jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, meta.AxisMetadata)):
        assert len(leaf.names) == leaf.value.ndim
    kernel = boxed["blocks"]["mixer"]["query"]["kernel"]
    assert kernel.names == ("layers", "modality", "embed", "heads", "head_dim")


def test_bad_requests_are_named():
    with pytest.raises(UsageError, match=r"first=\(9,\) must name"):
        small().clone(first=(9,))
    with pytest.raises(UsageError, match="rising and below vocab=24"):
        small().clone(first=(17, 9))
    with pytest.raises(UsageError, match="2 modalities and the FFN 3"):
        ModalBlock(ModalAttention(4), ModalGated(8, 3))
    with pytest.raises(UsageError, match="no biases"):
        ModalAttention(4, qkv_bias=True)
    with pytest.raises(UsageError, match="normalises each head alone"):
        ModalAttention(4, qk_norm=True, qk_norm_over="width")
    with pytest.raises(UsageError, match="knows rms and layer"):
        ModalBlock(ModalAttention(4), ModalGated(8), norm="rms_offset")
