"""The closed forms of a Block Transformer against its own arrays, and the paper's claim."""

import jax
import jax.numpy as jnp
import pytest
from flax.core import meta

from configs.language import block_transformer as config_file
from effjax import models
from effjax.config import build_kind
from effjax.errors import UsageError
from effjax.ffn import MLP
from effjax.measure import count
from effjax.measure.analytic.global_to_local import GlobalToLocal, OneStack, best, decode
from effjax.measure.analytic.shape import DecoderShape
from effjax.measure.chips import CHIPS
from effjax.mixers import Attention
from effjax.models.lm import LM, DecoderBlock


def built(variant):
    return build_kind(models.KINDS, config_file.get_config(variant).model, "config.model")


def vanilla(depth, dim, heads):
    """Pythia's blocks, as the paper's baseline has them."""
    mixer = Attention(heads, rotary_base=1e4, rotary_dims=dim // heads // 4, causal=True)
    block = DecoderBlock(mixer, MLP(), norm="layer", parallel="two_norms")
    return OneStack(DecoderShape.of(LM(block, 50_304, dim, depth)))


def shapes(model):
    return meta.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))


@pytest.mark.parametrize("variant", ["smoke", "33m", "420m"])
def test_parameters_are_those_of_the_model(variant):
    model = built(variant)
    assert GlobalToLocal.of(model).parameters == sum(x.size for x in jax.tree.leaves(shapes(model)))


def test_the_cache_is_that_of_the_model():
    model, context = built("smoke"), 64
    state = jax.eval_shape(lambda: model.init_cache(1, context, jnp.bfloat16))
    held = sum(2 * cache.values.size * 2 for cache in (state.blocks, state.tokens))
    spare = 2 * 2 * 2 * 32  # two blocks that a step may stretch over: keys and values of 32 channels
    assert held - spare == GlobalToLocal.of(model).cache_bytes(context)


def test_macs_are_those_of_a_block_decoded():
    model, context = built("smoke"), 40
    state = jax.eval_shape(lambda: model.init_cache(1, 64))
    token = jnp.zeros((1, 1), jnp.int32)
    variables = shapes(model)
    # The condition is counted at its dearest: all that is run at the edge of a block.
    edge = count(lambda v, s: model.apply(v, token, s, method="step"), variables, state).macs
    shape = GlobalToLocal.of(model)
    lower, upper = shape.blocks, shape.tokens
    slots = 64 // 4 + 2
    within = upper.block_matrices + 2 * 5 * 32 + 256 * 32
    across = lower.block_matrices + 2 * slots * 32 + 2 * 32 * 32 + 2 * (upper.block_matrices + 2 * 5 * 32)
    assert edge == within + across
    # A block: the edge without the token, three tokens within; a cache's free slots are multiplied too.
    mean = (across + 256 * 32 + 3 * within) / 4
    free = 2 * (slots - context / 4) * 32 / 4 + 2 * (25 - 15) * 32 / 4
    assert shape.macs(context) == pytest.approx(mean - free)


def test_the_cache_is_read_a_block_of_times_a_block_of_times_less():
    shape, plain = GlobalToLocal.of(built("420m")), vanilla(24, 1024, 16)
    for context in (2048, 8192):
        assert 7.5 < plain.cache_bytes(context) / shape.cache_bytes(context) < 8.0
        assert 29 < plain.cache_read(context) / shape.cache_read(context) < 32
    assert 1.4 < plain.weights_read() / shape.weights_read() < 1.5


def test_the_order_of_the_claim_comes_out():
    # 10 to 20 times a smaller model of one stack; which pairs are alike in perplexity is the paper's to say.
    pairs = [(vanilla(6, 512, 8), "170m"), (vanilla(12, 768, 12), "420m"), (vanilla(24, 1024, 16), "1.4b")]
    for plain, variant in pairs:
        ours = best(GlobalToLocal.of(built(variant)), CHIPS["h100"], 2048)
        theirs = best(plain, CHIPS["h100"], 2048)
        assert theirs.bound == "memory"
        assert 10 < ours.tokens_per_second / theirs.tokens_per_second < 20


def test_one_sequence_is_bound_by_weights():
    model = GlobalToLocal.of(built("420m"))
    alone = decode(model, CHIPS["h100"], 2048, 1)
    assert alone.bound == "memory"
    assert alone.seconds == pytest.approx(2 * model.weights_read() / CHIPS["h100"].bandwidth, rel=0.02)
    with pytest.raises(UsageError, match="not one sequence"):
        best(model, CHIPS["h100"], 10**9)
