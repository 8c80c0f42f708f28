"""Stacks whose layers have definitions of their own, in every model that has one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from ml_collections import ConfigDict

from effjax import models
from effjax.config import build_kind
from effjax.errors import UsageError
from effjax.ffn.gated import Gated
from effjax.ffn.mlp import MLP
from effjax.interop.converted import section
from effjax.layers.stack import Layers, Stack, beside, layer_name
from effjax.mixers.attention import Attention
from effjax.mixers.context import Context
from effjax.models.blocks.adaln import DiTBlock
from effjax.models.blocks.metaformer import Block
from effjax.models.dit import DiT
from effjax.models.lm import LM, DecoderBlock
from effjax.models.vit import ViT


def vit(**fields):
    block = Block(Attention(2), MLP(ratio=2.0))
    return ViT(**dict(block=block, patch=4, dim=8, depth=3, classes=5) | fields)


def dit(**fields):
    block = DiTBlock(Attention(2), MLP(ratio=2.0))
    return DiT(**dict(patch=4, dim=8, depth=3, classes=5, block=block, learned_sigma=False) | fields)


def lm(**fields):
    block = DecoderBlock(Attention(4, kv_heads=2, causal=True, rotary_base=1e4), Gated(12))
    return LM(**dict(block=block, vocab=11, dim=8, depth=3) | fields)


def inputs(model, draw):
    if isinstance(model, LM):
        return (jnp.asarray(draw.integers(0, 11, (2, 6))),)
    pictures = jnp.asarray(draw.normal(size=(2, 8, 8, 1)), jnp.float32)
    return (pictures,) if isinstance(model, ViT) else (pictures, jnp.ones(2), jnp.arange(2))


def drawn(model, args, draw):
    """Parameters none of which is zero."""
    shapes = jax.eval_shape(lambda: meta.unbox(model.init(jax.random.key(0), *args)))
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * draw.normal(size=leaf.shape), leaf.dtype), shapes)


def taken_apart(variables, depth=3):
    layers = {
        layer_name(i): jax.tree.map(lambda p, i=i: p[i], variables["params"]["blocks"]) for i in range(depth)
    }
    return {"params": {**variables["params"], "blocks": layers}}


@pytest.mark.parametrize("make", [vit, dit, lm])
def test_equal_definitions_one_by_one_are_the_stack(make, draw):
    plain, args = make(), inputs(make(), draw)
    own = make(layer_blocks=(plain.block,) * 3)
    variables = drawn(plain, args, draw)
    apart = taken_apart(variables)
    made = jax.eval_shape(lambda: meta.unbox(own.init(jax.random.key(0), *args)))
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, apart)
    np.testing.assert_allclose(
        jax.jit(own.apply)(apart, *args), jax.jit(plain.apply)(variables, *args), rtol=1e-5, atol=1e-6
    )


WIDTHS = (
    dict(mixer=Attention(1, head_dim=4, value_dim=6), ffn=MLP(5)),
    dict(mixer=None, ffn=MLP(7)),
    dict(mixer=Attention(3, head_dim=2), ffn=None),
)


@pytest.mark.parametrize(("make", "block"), [(vit, Block), (dit, DiTBlock)])
def test_layers_may_differ_in_width_and_lack_a_branch(make, block, draw):
    blocks = tuple(block(**widths) for widths in WIDTHS)
    model, args = make(layer_blocks=blocks), inputs(make(), draw)
    variables = drawn(model, args, draw)
    layers = variables["params"]["blocks"]
    assert layers["layer_0"]["mixer"]["value"]["kernel"].shape == (8, 1, 6)
    assert "mixer" not in layers["layer_1"]
    assert "ffn" not in layers["layer_2"]

    run = jax.jit(model.apply)
    y = run(variables, *args)
    for i in range(3):
        changed = jax.tree.map(jnp.zeros_like, layers[f"layer_{i}"])
        others = {"params": {**variables["params"], "blocks": {**layers, f"layer_{i}": changed}}}
        assert not np.allclose(y, run(others, *args)), f"layer {i} takes part"


def test_a_layer_without_both_branches_is_the_identity(draw):
    block = Block(Attention(2), MLP(6))
    cut, args = vit(layer_blocks=(block, Block(None, None), block)), inputs(vit(), draw)
    variables = drawn(cut, args, draw)
    assert "layer_1" not in variables["params"]["blocks"]
    layers = variables["params"]["blocks"]
    short = {"layer_0": layers["layer_0"], "layer_1": layers["layer_2"]}
    model = vit(depth=2, layer_blocks=(block, block))
    y = model.apply({"params": {**variables["params"], "blocks": short}}, *args)
    np.testing.assert_array_equal(cut.apply(variables, *args), y)


def own_lm(first, **fields):
    kept = dict(causal=True, rotary_base=1e4, rotary_dims=8, rotary_kept=(0, 3), scale=8**-0.5)
    blocks = DecoderBlock(first, Gated(5)), DecoderBlock(None, Gated(7)), DecoderBlock(
        Attention(4, kv_heads=2, head_dim=4, **kept), None
    )  # fmt: skip
    return lm(layer_blocks=blocks, **fields)


FIRST = Attention(2, head_dim=4, value_dim=6, causal=True, rotary_base=1e4)


@pytest.mark.parametrize("first", [FIRST, None], ids=["mixer", "none_at_first"])
def test_decoding_gives_what_the_whole_sequence_gives(first, draw):
    model = own_lm(first, position_table=6)
    (tokens,) = inputs(model, draw)
    variables = drawn(model, (tokens,), draw)
    whole = jax.jit(model.apply)(variables, tokens)
    step = jax.jit(lambda v, t, c: model.apply(v, t, c, method="step"))
    caches = model.init_cache(2, 6)
    logits, caches = step(variables, tokens[:, :3], caches)
    found = [logits]
    for i in range(3, 6):
        logits, caches = step(variables, tokens[:, i : i + 1], caches)
        found.append(logits)
    np.testing.assert_allclose(jnp.concatenate(found, 1), whole, rtol=1e-4, atol=1e-5)


def test_pairs_that_are_left_turn_as_they_did(draw):
    """A head whose other pairs have no weights is a head of the pairs that are left."""
    whole = Attention(1, head_dim=8, causal=True, rotary_base=1e4)
    cut = Attention(1, head_dim=4, value_dim=8, causal=True, rotary_base=1e4, rotary_dims=8,
                    rotary_kept=(1, 2), scale=8**-0.5)  # fmt: skip
    x = jnp.asarray(draw.normal(size=(2, 5, 8)), jnp.float32)
    params = drawn(whole, (x, Context()), draw)["params"]
    channels = jnp.asarray([1, 2, 5, 6])  # i and i + 4 turn together
    gone = jnp.asarray([0, 3, 4, 7])
    for name in ("query", "key"):
        params[name] = jax.tree.map(lambda p: p.at[..., gone].set(0.0), params[name])
    small = {
        **params,
        **{name: jax.tree.map(lambda p: p[..., channels], params[name]) for name in ("query", "key")},
    }
    np.testing.assert_allclose(
        cut.apply({"params": small}, x, Context()), whole.apply({"params": params}, x, Context()), atol=1e-6
    )


def test_what_layers_have_stands_beside_each_other():
    tree = beside([{"a": jnp.zeros(2)}, None, {"a": jnp.zeros(3)}])
    assert [leaf if leaf is None else leaf.shape for leaf in tree["a"].each] == [(2,), None, (3,)]
    assert beside([None, None]) is None
    assert isinstance(tree["a"], Layers)


def test_bad_blocks_are_refused():
    block = Block(Attention(2), MLP(6))
    with pytest.raises(UsageError, match="depth=3, and 2 blocks"):
        Stack(block, 3, blocks=(block, block))
    with pytest.raises(UsageError, match="share no parameters"):
        Stack(block, 1, shared=(".*",), blocks=(block,))
    with pytest.raises(UsageError, match="order 'pre_norm'"):
        Block(None, MLP(6), order="parallel")
    with pytest.raises(UsageError, match="rotary_dims"):
        Attention(1, rotary_base=1e4, rotary_kept=(5,), rotary_dims=8).sizes(8)


@pytest.mark.parametrize("model", [own_lm(None), vit(layer_blocks=tuple(Block(**w) for w in WIDTHS))])
def test_a_config_says_what_each_layer_is(model):
    built = build_kind(models.KINDS, ConfigDict(section(model, models.KINDS)), "config.model")
    assert built == model
