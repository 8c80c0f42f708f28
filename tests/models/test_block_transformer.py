"""Who sees whom in a Block Transformer, and that decoding with two caches is the whole forward pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.decoding.generate import generate, left_pad
from effjax.decoding.sampling import Sampling
from effjax.errors import UsageError
from effjax.ffn import MLP, Gated
from effjax.mixers import Attention, Mamba
from effjax.models.block_transformer import BlockTransformer
from effjax.models.lm import LM, DecoderBlock

VOCAB, DIM = 23, 16


def decoder(heads=2, **fields):
    mixer = Attention(heads, rotary_base=100.0, rotary_dims=4, causal=True)
    return DecoderBlock(mixer, MLP(ratio=2.0), **{"norm": "layer", "parallel": "two_norms", **fields})


def small(**fields):
    return BlockTransformer(
        decoder(), decoder(4), **{"vocab": VOCAB, "dim": DIM, "block_depth": 2, "token_depth": 2, **fields}
    )


@functools.partial(jax.jit, static_argnames="model")
def apply(model, variables, tokens, segments=None):
    return model.apply(variables, tokens, None, segments)


@functools.partial(jax.jit, static_argnames="model")
def step(model, variables, tokens, state, positions=None):
    return model.apply(variables, tokens, state, positions, method="step")


@functools.cache
def drawn(model):
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(1), jnp.zeros((1, 4), jnp.int32)))
    draw = np.random.default_rng(2)
    return jax.tree.map(lambda leaf: jnp.float32(draw.normal(size=leaf.shape) * 0.3), shapes)


TOKENS = jax.random.randint(jax.random.key(0), (2, 14), 0, VOCAB)


def test_every_parameter_names_its_axes():
    boxed = jax.eval_shape(small().init, jax.random.key(0), TOKENS)["params"]
    for leaf in jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, meta.AxisMetadata)):
        assert len(leaf.names) == leaf.value.ndim
    assert set(boxed) == {
        "embedder", "embedding", "head", "lower", "upper", "lower_norm", "upper_norm", "expansion"
    }  # fmt: skip


@pytest.mark.parametrize(("block", "prefix", "n"), [(4, 2, 11), (3, 1, 12)])
def test_causality_by_jacobian(block, prefix, n):
    model = small(block_length=block, prefix=prefix, dim=24)
    params, tokens = drawn(model)["params"], jnp.arange(n)[None]  # every place has a row of the tables
    seen = jnp.float32(np.random.default_rng(3).normal(size=VOCAB))

    @jax.jit
    def slopes(tables):
        return jax.jacobian(lambda t: model.apply({"params": {**params, **t}}, tokens)[0] @ seen)(tables)

    found = slopes({name: params[name] for name in ("embedder", "embedding")})
    t, s = jnp.arange(n)[:, None], jnp.arange(n)[None, :]
    # A token is told by the context of all blocks before that of its target, and by itself within that one.
    before, within = s // block < (t + 1) // block, (s // block == (t + 1) // block) & (s <= t)
    for name, expected in [("embedder", before), ("embedding", within)]:
        size = np.abs(found[name]).max(axis=-1)[:, :n]
        np.testing.assert_array_equal(size > 1e-7, expected)
    np.testing.assert_array_equal(before | within, s <= t)


def test_blocks_of_one_token_and_no_token_decoder_are_a_plain_model():
    plain = LM(decoder(epsilon=1e-12), VOCAB, DIM, 3)
    model = BlockTransformer(
        decoder(epsilon=1e-12), decoder(epsilon=1e-12), VOCAB, DIM, 3, 0, block_length=1, prefix=1
    )
    variables = drawn(plain)
    params = variables["params"]
    mine = {
        "embedder": params["embedding"],
        "embedding": drawn(model)["params"]["embedding"],
        "head": params["head"],
        "lower": params["blocks"],
        "lower_norm": {"scale": jnp.ones(DIM), "bias": jnp.zeros(DIM)},
        "expansion": {"kernel": jnp.eye(DIM)[:, None], "bias": jnp.zeros((1, DIM))},
        "upper_norm": params["norm"],
    }
    whole = apply(plain, variables, TOKENS)
    np.testing.assert_allclose(apply(model, {"params": mine}, TOKENS), whole, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        in_steps(model, TOKENS, (5, 1, 8), {"params": mine}), whole, rtol=1e-4, atol=1e-4
    )


def in_steps(model, tokens, sizes, variables=None, positions=None):
    """Logits of pieces of these sizes, one after another through the caches."""
    state, logits = model.init_cache(tokens.shape[0], tokens.shape[1]), []
    for cut, size in zip(np.cumsum((0, *sizes)), sizes, strict=False):
        piece = slice(int(cut), int(cut) + size)
        where = None if positions is None else positions[:, piece]
        new, state = step(model, variables or drawn(model), tokens[:, piece], state, where)
        logits.append(new)
    return jnp.concatenate(logits, axis=1)


@pytest.mark.parametrize("sizes", [(1,) * 14, (6, 1, 1, 6), (2, 10, 1, 1)])
def test_cached_decoding_equals_the_whole(sizes):
    whole = apply(small(), drawn(small()), TOKENS)
    assert np.abs(whole).max() > 1
    np.testing.assert_allclose(in_steps(small(), TOKENS, sizes), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("block", "prefix"), [(1, 2), (2, 1), (8, 3)])
def test_other_blocks_decode_alike(block, prefix):
    model = small(block_length=block, prefix=prefix, block_depth=1, token_depth=1)
    whole = apply(model, drawn(model), TOKENS)
    sizes = (6, 1, 1, 1, 1, 1, 1, 1, 1)
    np.testing.assert_allclose(in_steps(model, TOKENS, sizes), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", [3, 6])
def test_left_padding_is_never_seen(padding):
    # The second text stands behind padding, so that its blocks end elsewhere than those of the first.
    positions = jnp.stack([jnp.arange(14), jnp.arange(14) - padding])
    tokens = TOKENS.at[1, :padding].set(7)
    logits = in_steps(small(), tokens, (6, 1, 1, 6), positions=positions)
    np.testing.assert_allclose(logits[0], apply(small(), drawn(small()), TOKENS)[0], rtol=1e-5, atol=1e-5)
    alone = apply(small(), drawn(small()), jnp.roll(tokens, -padding, axis=1))[1, : 14 - padding]
    np.testing.assert_allclose(logits[1, padding:], alone, rtol=1e-5, atol=1e-5)


def test_generation_goes_on_from_unequal_prompts_as_from_each_alone():
    model, variables = small(), drawn(small())
    prompts, lengths = left_pad([[3, 1, 4, 1, 5, 9, 2], [6], [5, 3]])
    options = dict(max_new=9, key=jax.random.key(0), sampling=Sampling(temperature=0.0))
    together = generate(model, variables, prompts, lengths, **options)
    for row, size in enumerate([7, 1, 2]):
        text = [*prompts[row, 7 - size :].tolist(), *together[row].tolist()]
        logits = apply(model, variables, jnp.array([text]))[0]
        np.testing.assert_array_equal(jnp.argmax(logits[size - 1 : -1], -1), together[row])


def test_documents_of_a_row_do_not_see_each_other():
    segments = jnp.array([[1] * 8 + [2] * 6, [1] * 5 + [2] * 2 + [3] * 7])
    variables = drawn(small())
    together = apply(small(), variables, TOKENS, segments)
    # A document that begins with a block is as it is alone.
    np.testing.assert_allclose(
        together[0, :8], apply(small(), variables, TOKENS[:1, :8])[0], rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
        together[0, 8:], apply(small(), variables, TOKENS[:1, 8:])[0], rtol=1e-5, atol=1e-5
    )
    for row, (start, stop) in [(0, (0, 8)), (0, (8, 14)), (1, (0, 5)), (1, (5, 7)), (1, (7, 14))]:
        inside = (jnp.arange(14) >= start) & (jnp.arange(14) < stop)
        others = jnp.where(inside, TOKENS[row], (TOKENS[row] + 1) % VOCAB)[None]
        moved = apply(small(), variables, others, segments[row : row + 1])[0]
        np.testing.assert_allclose(moved[start:stop], together[row, start:stop], rtol=1e-5, atol=1e-5)
        assert np.abs(moved - together[row])[~np.asarray(inside)].max() > 0.1


def test_a_row_needs_not_fill_its_blocks():
    whole = apply(small(), drawn(small()), TOKENS)
    for n in (1, 5, 12):
        short = apply(small(), drawn(small()), TOKENS[:, :n])
        np.testing.assert_allclose(short, whole[:, :n], rtol=1e-5, atol=1e-5)


def test_bfloat16_decodes_too():
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), drawn(small()))
    whole = apply(small(), low, TOKENS)
    assert whole.dtype == jnp.float32
    np.testing.assert_allclose(whole, apply(small(), drawn(small()), TOKENS), atol=1.0)
    state = small().init_cache(2, 14, jnp.bfloat16)
    logits, state = step(small(), low, TOKENS[:, :7], state)
    after, state = step(small(), low, TOKENS[:, 7:8], state)
    assert state.blocks.keys.dtype == state.context.dtype == jnp.bfloat16
    np.testing.assert_allclose(jnp.concatenate([logits, after], 1), whole[:, :8], atol=0.5)


def test_the_caches_are_as_small_as_promised():
    state = jax.eval_shape(lambda: small().init_cache(2, 400))
    assert state.blocks.keys.shape == (2, 2, 102, 2, 8)
    assert state.tokens.keys.shape == (2, 2, 5, 4, 4)
    for leaf, axes in zip(
        jax.tree.leaves(state), jax.tree.leaves(small().cache_axes(), is_leaf=plain), strict=True
    ):
        assert leaf.ndim == len(axes) + 1


def plain(value):
    return isinstance(value, tuple) and all(isinstance(item, str) for item in value)


def test_bad_requests_are_named():
    with pytest.raises(UsageError, match="14 tokens is longer than the 9"):
        small(max_length=9).init(jax.random.key(0), TOKENS)
    with pytest.raises(UsageError, match="10 tokens is longer than the 9"):
        small(max_length=9).init_cache(1, 10)
    with pytest.raises(UsageError, match="divide dim=16"):
        small(block_length=3)
    with pytest.raises(UsageError, match="causal attention"):
        BlockTransformer(DecoderBlock(Mamba(), Gated(8)), decoder(), VOCAB, DIM, 2, 2)
