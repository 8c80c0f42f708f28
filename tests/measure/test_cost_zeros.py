"""What is left to multiply where zeros are skipped: the table of SPDF, and by hand."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax.core import meta

from effjax.config import build_kind
from effjax.errors import UsageError
from effjax.measure import count
from effjax.models import KINDS

# GPT-3 XL: 24 blocks of width 2048 on 2048 tokens, 50,257 words, head and table the same.
DEPTH, WIDTH, LENGTH, WORDS = 24, 2048, 2048, 50_257
XL = dict(
    kind="lm",
    block=dict(
        mixer=dict(kind="attention", heads=16, causal=True),
        ffn=dict(kind="mlp", ratio=4, activation="gelu_tanh"),
        norm="layer",
    ),
    vocab=WORDS,
    dim=WIDTH,
    depth=DEPTH,
    tied=True,
    position_table=LENGTH,
)


@functools.cache
def xl():
    """One forward pass over a row of tokens, counted from shapes."""
    model = build_kind(KINDS, XL, "config.model")
    tokens = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    params = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens))["params"]
    return count(lambda params, tokens: model.apply({"params": params}, tokens), params, tokens)


@pytest.mark.parametrize(("sparsity", "published"), [(0.75, 2.49), (0.5, 1.67)])
def test_the_ratios_of_gpt_3_xl_are_those_of_the_paper(sparsity, published):
    cost = xl()
    linear = 24 * 12 * WIDTH**2
    rest = 24 * 2 * LENGTH * WIDTH + WORDS * WIDTH
    assert cost.macs == LENGTH * (linear + rest)
    left = cost.macs_without_zeros([("blocks/(mixer|ffn)/.*", sparsity)])
    assert left == LENGTH * (linear * (1 - sparsity) + rest)
    assert round(cost.macs / left, 2) == published
    assert cost.parameters == pytest.approx(1.3e9, rel=0.02)


def test_every_matrix_has_a_share_of_its_own():
    params = {"a": jnp.ones((4, 6)), "b": jnp.ones((6, 2)), "bias": jnp.ones(2)}
    run = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"] + p["bias"][None]
    cost = count(run, params, jnp.ones((3, 4)))
    assert cost.macs_by_path == {"a": 3 * 24, "b": 3 * 12, "bias": 0}
    assert cost.macs_without_zeros([("a", 0.5), ("b", 0.25)]) == 36 + 27
    assert cost.macs_without_zeros([]) == cost.macs
    assert cost.macs_without_zeros([(".*", 1.0)]) == 0


def test_wrong_rules_are_refused():
    cost = count(lambda p, x: x @ p["a"], {"a": jnp.ones((4, 6))}, jnp.ones((3, 4)))
    with pytest.raises(UsageError, match="matches no parameter"):
        cost.macs_without_zeros([("b", 0.5)])
    with pytest.raises(UsageError, match=r"1\.5 for 'a'"):
        cost.macs_without_zeros([("a", 1.5)])
