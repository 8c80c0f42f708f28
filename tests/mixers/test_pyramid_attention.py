"""Pyramid sparse attention: what is chosen, that all of it is dense, and that smooth keys lose little."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from effjax.errors import UsageError
from effjax.mixers import Attention, PyramidAttention
from effjax.mixers.context import Context
from effjax.mixers.pyramid_attention import importance, levels
from pallas_kernels import block_sparse_attention

N, WIDTH = 75, 16
HEADS = dict(heads=4, kv_heads=2, head_dim=8, qkv_bias=False, out_bias=False)
BLOCKS = dict(queries=16, keys=8)


@functools.cache
def params():
    x = jnp.zeros((1, N, WIDTH))
    shapes = meta.unbox(jax.eval_shape(Attention(**HEADS).init, jax.random.key(0), x, Context()))
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: np.float32(0.4 * draw.normal(size=leaf.shape)), shapes)


def tokens(batch=2):
    return jnp.float32(np.random.default_rng(1).normal(size=(batch, N, WIDTH)))


def apply(x, context=None, **fields):
    return jax.jit(PyramidAttention(**(HEADS | BLOCKS | fields)).apply)(params(), x, context or Context())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shares_of", ["blocks", "mass"])
def test_all_blocks_are_dense_attention(causal, shares_of):
    fields = dict(causal=causal, rotary_base=1e4)
    dense = jax.jit(Attention(**HEADS, **fields).apply)(params(), tokens(), Context())
    found = apply(tokens(), shares=(1.0,), shares_of=shares_of, **fields)
    np.testing.assert_allclose(found, dense, atol=1e-5)


@pytest.mark.parametrize("together", [False, True])
def test_a_token_sees_no_later_one_and_at_least_itself(together):
    run = functools.partial(apply, causal=True, shares=(0.2, 0.0, 0.3), together=together)
    x = tokens()
    clean = run(x)
    # What a block of queries chooses depends on all of its own.
    found = run(x.at[:, 48:].set(3.0))
    np.testing.assert_array_equal(found[:, :48], clean[:, :48])
    assert np.abs(found[:, 48:] - clean[:, 48:]).max(axis=2).min() > 1e-3
    assert np.abs(clean).max(axis=2).min() > 1e-3


def test_scores_are_of_the_best_pair_of_each_two_blocks():
    """With every token sampled: blocks of 3 keys and of 2 queries, the last ones shorter."""
    draw = np.random.default_rng(0)
    q, k = draw.normal(size=(1, 5, 4, 8)), draw.normal(size=(1, 7, 2, 8))
    found = jax.jit(functools.partial(importance, queries=1, keys=1, causal=False))(*map(jnp.float32, (q, k)))
    logits = np.einsum("bnhd,bshd->bhns", q, np.repeat(k, 2, axis=2)) / np.sqrt(8)
    exact = np.exp(logits - logits.max(axis=3, keepdims=True))
    np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-6)
    found = jax.jit(functools.partial(importance, queries=4, keys=4, causal=True))(*map(jnp.float32, (q, k)))
    # Sampled are queries 3 and 4 and keys 3 and 4, which stand at places 5, 6 and 3, 4.
    some = logits[:, :, 3:5, 3:5]
    np.testing.assert_allclose(found, np.exp(some - some.max(axis=3, keepdims=True)), rtol=1e-4, atol=1e-6)


def test_blocks_that_come_later_have_no_score():
    q, k = jnp.ones((1, 32, 1, 8)), jnp.ones((1, 32, 1, 8))
    found = jax.jit(functools.partial(importance, queries=8, keys=8, causal=True))(q, k)
    np.testing.assert_array_equal(found[0, 0] < 0, np.triu(np.ones((4, 4)), 1))


def test_levels_by_rank_and_by_mass():
    scores = jnp.float32([[[[0.1, 0.4, -1.0, 0.3, 0.2]], [[1.0, 1.0, 1.0, 1.0, -1.0]]]])
    by = jax.jit(levels, static_argnums=(1, 2))
    found = by(scores, (0.25, 0.0, 0.5), "blocks")
    np.testing.assert_array_equal(found, [[[[0, 1, 0, 3, 3]], [[1, 3, 3, 0, 0]]]])
    # 0.4 are within the first 0.3, 0.7 within 0.3 + 0.1, 0.9 within 0.8.
    found = by(scores, (0.3, 0.2, 0.3), "mass")
    np.testing.assert_array_equal(found, [[[[0, 1, 0, 2, 3]], [[1, 1, 3, 3, 0]]]])
    # A share of less than a block is one.
    found = by(scores, (0.01,), "blocks")
    np.testing.assert_array_equal(found, [[[[0, 1, 0, 0, 0]], [[1, 0, 0, 0, 0]]]])


def test_averages_of_smooth_keys_are_better_than_none():
    """At as many rows that are read: an eighth whole and averages of others against the best blocks."""
    draw = np.random.default_rng(0)
    walk = np.cumsum(draw.normal(size=(1, 256, WIDTH)), axis=1)
    x = jnp.float32(walk / np.abs(walk).max())
    dense = jax.jit(Attention(**HEADS).apply)(params(), x, Context())
    off = lambda *shares: np.abs(apply(x, shares=shares) - dense).max()
    assert off(0.125, 0.0, 0.0, 0.5) < 0.5 * off(0.1875)


def test_the_kernel_gives_the_same(monkeypatch):
    """The TPU's, interpreted, in place of the choice; and the reference where it is named."""
    called = []

    def interpreted(op, *arrays, implementation, interpret, strict, **options):
        called.append(implementation)
        chosen = dict(implementation="tpu", interpret=pltpu.InterpretParams())
        return op(
            *arrays, **(chosen if implementation is None else dict(implementation="reference")), **options
        )

    monkeypatch.setattr(
        block_sparse_attention, "OP", functools.partial(interpreted, block_sparse_attention.OP)
    )
    fields = dict(shares=(0.2, 0.0, 0.5), causal=True, together=True)
    wanted = apply(tokens(), **fields, implementation="reference")
    np.testing.assert_allclose(apply(tokens(), **fields), wanted, atol=1e-5)
    assert called == ["reference", None]


def test_a_program_for_several_devices_has_the_kernel():
    """Cut by rows and heads; nothing else would be lowered without a warning, which is an error here."""
    mesh = AbstractMesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    rules = (("batch", "data"), ("heads", "tensor"), ("kv_heads", "tensor"))
    mixer = PyramidAttention(**HEADS, queries=16, keys=64)
    shapes = jax.eval_shape(params)
    run = lambda p, x: mixer.apply(p, x, Context())
    with jax.sharding.use_abstract_mesh(mesh), nn.logical_axis_rules(rules):
        cut = NamedSharding(mesh, PartitionSpec("data"))
        traced = jax.jit(run, in_shardings=(NamedSharding(mesh, PartitionSpec()), cut)).trace(
            shapes, jax.eval_shape(tokens)
        )
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 1


def test_decoding_reads_all_keys():
    fields = dict(causal=True, rotary_base=1e4)
    x = tokens(1)
    outputs = []
    for mixer in (PyramidAttention(**HEADS, **BLOCKS, shares=(0.1,), **fields), Attention(**HEADS, **fields)):
        cache = mixer.init_cache(1, N, WIDTH, jnp.float32)
        step = jax.jit(functools.partial(mixer.apply, method="step"))
        y, cache = step(params(), x[:, :70], cache, Context())
        outputs.append(np.concatenate([y, step(params(), x[:, 70:], cache, Context())[0]], axis=1))
    np.testing.assert_allclose(*outputs, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "context", "message"),
    [
        (dict(window=3), Context(), "has no window"),
        ({}, Context(valid=jnp.ones((2, N), bool)), "has no context.valid"),
        (dict(shares=()), Context(), "in all above 0"),
        (dict(shares=(0.5, 0.6)), Context(), "up to 1"),
        (dict(keys=12, shares=(0.1, 0.1, 0.1, 0.1)), Context(), "keys a multiple of 8"),
    ],
)
def test_bad_input(fields, context, message):
    with pytest.raises(UsageError, match=message):
        apply(tokens(), context, **fields)
