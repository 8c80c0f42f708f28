import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from configs.language.slab import get_config, progressive
from effjax.compress.slab import fold_norms
from effjax.config import build_kind
from effjax.experiment import resolve
from effjax.layers.progressive import Progressive
from effjax.models import KINDS
from tests.models import official
from tests.models.test_slab import linear_rows, norm_rows, with_counters


def toy(**more):
    mixer = dict(kind="attention", heads=2, qkv_bias=False, out_bias=False, rotary_base=1e4, causal=True)
    block = dict(mixer=mixer, ffn=dict(kind="gated", hidden=24), epsilon=1e-6, norm=progressive(10, 2))
    section = dict(kind="lm", block=block, vocab=19, dim=16, depth=3)
    return build_kind(KINDS, section | more, "config.model")


def rows():
    yield from (
        ("model.embed_tokens.weight", "params/embedding", ""),
        ("lm_head.weight", "params/head", ""),
        *rms_rows("model.norm", "norm"),
        *rms_rows("model.layers.{}.input_layernorm", "blocks/mixer_norm"),
        *rms_rows("model.layers.{}.post_attention_layernorm", "blocks/ffn_norm"),
    )
    mixer, theirs = "params/blocks/mixer", "model.layers.{}.self_attn"
    for letter, name in (("q", "query"), ("k", "key"), ("v", "value")):
        yield f"{theirs}.{letter}_proj.weight", f"{mixer}/{name}/kernel", "(h d) i -> i h d"
    yield f"{theirs}.o_proj.weight", f"{mixer}/output/kernel", "o (h d) -> h d o"
    for part, name in (("gate", "gate"), ("up", "expand"), ("down", "contract")):
        yield linear_rows(f"model.layers.{{}}.mlp.{part}_proj", f"blocks/ffn/{name}")[0]


def rms_rows(theirs, ours):
    return [row for row in norm_rows(theirs, ours) if not row[1].endswith("before/bias")]


@functools.cache
def published():
    tensors, tokens, expected = official.recording("slab_lm")
    variables = official.translated(tensors, list(rows()), h=2)
    return with_counters(toy(), variables, tokens), tokens, expected


@functools.partial(jax.jit, static_argnames="model")
def run(model, variables, tokens):
    return model.apply(variables, tokens)


@functools.partial(jax.jit, static_argnames="model")
def trained(model, variables, tokens):
    return model.apply(variables, tokens, train=True, mutable=["batch_stats"])


def test_equals_the_published_code():
    variables, tokens, expected = published()
    official.check(toy(), variables, tokens, expected)


@pytest.mark.parametrize("more", [{}, {"tied": True}, {"head_bias": True, "logit_scale": 0.3}])
def test_folded_it_is_the_same(more):
    variables, tokens, _ = published()
    model, params = toy(**more), dict(variables["params"])
    if "tied" in more:
        del params["head"]
    if "head_bias" in more:
        params["head_bias"] = jnp.linspace(-1.0, 1.0, 19)
    variables = {**variables, "params": params}
    fast, folded = fold_norms(model, variables)
    before, after = run(model, variables, tokens), run(fast, folded, tokens)
    assert jnp.abs(after - before).max() <= 1e-5 * jnp.abs(before).max()
    shapes = meta.unbox(jax.eval_shape(fast.init, jax.random.key(0), tokens))
    assert jax.tree.map(jnp.shape, folded) == jax.tree.map(jnp.shape, shapes)
    assert not any("norm" in jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(folded))


def test_folded_it_writes_token_by_token():
    variables, tokens, _ = published()
    fast, folded = fold_norms(toy(), variables)
    caches, logits = fast.init_cache(2, 9), []
    step = jax.jit(lambda tokens, caches: fast.apply(folded, tokens, caches, method="step"))
    for place in range(9):
        one, caches = step(tokens[:, place : place + 1], caches)
        logits.append(one)
    np.testing.assert_allclose(
        jnp.concatenate(logits, 1), run(toy(), variables, tokens), rtol=1e-4, atol=1e-5
    )


def test_the_past_sees_the_future_in_training_alone():
    variables, tokens, _ = published()
    changed = np.array(tokens)
    changed[:, 6:] = (changed[:, 6:] + 1) % 19
    before, after = (run(toy(), variables, t) for t in (tokens, changed))
    np.testing.assert_allclose(before[:, :6], after[:, :6], rtol=1e-5, atol=1e-6)
    late = at_pass(variables, 12)
    before, after = (trained(toy(), late, t)[0] for t in (tokens, changed))
    assert jnp.abs(before - after)[:, :6].max() > 1e-2
    # Before that it is a model with RMS norms, and these see a token each.
    before, after = (trained(toy(), variables, t)[0] for t in (tokens, changed))
    np.testing.assert_allclose(before[:, :6], after[:, :6], rtol=1e-5, atol=1e-6)


def test_every_layer_counts_and_averages_for_itself():
    variables, tokens, _ = published()
    _, collections = trained(toy(), variables, tokens)
    moved = collections["batch_stats"]
    np.testing.assert_array_equal(moved["blocks"]["mixer_norm"]["passes"], [1, 1, 1])
    assert int(moved["norm"]["passes"]) == 1
    means = moved["blocks"]["ffn_norm"]["after"]["batch"]["mean"]  # [L, C]
    held = variables["batch_stats"]["blocks"]["ffn_norm"]["after"]["batch"]["mean"]
    assert (np.abs(means - held).max(axis=1) > 1e-3).all()
    _, collections = trained(toy(), at_pass(variables, 12), tokens)
    assert int(collections["batch_stats"]["norm"]["passes"]) == 12


def at_pass(variables, passes):
    stats = jax.tree.map(
        lambda leaf: jnp.full_like(leaf, passes) if leaf.dtype == jnp.int32 else leaf,
        variables["batch_stats"],
    )
    return {**variables, "batch_stats": stats}


def test_the_published_size():
    model = resolve(get_config("350m")).model
    assert model.block.norm == Progressive(18_000, "progressive", 1e-6, "rms", 10_000, 0.0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 8), jnp.int32))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == 367_639_589
