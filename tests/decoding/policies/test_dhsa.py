import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.config import build
from effjax.decoding.generate import generate, left_pad
from effjax.decoding.policies.dhsa import DHSA
from effjax.decoding.sampling import Sampling
from effjax.errors import UsageError
from effjax.mixers.boundaries import Even, Similarity
from effjax.mixers.chunks import chunk_numbers, importance, within_budget
from effjax.models.lm import LM
from tests.decoding.policies.common import BLOCK, plain_look, stepwise, toy, variables

SIZE = 24
FIRST = 18


@pytest.fixture
def tokens(draw):
    return draw.integers(0, 17, (3, SIZE))


def drawn(draw, n, rows=2, groups=2, heads=4):
    shapes = ((rows, n, heads, 4), (rows, n, groups, 4), (rows, n, groups, 4))
    return [jnp.asarray(draw.normal(size=shape), jnp.float32) for shape in shapes]


def attend(policy, q, k, v, slots, cache=None, first=0):
    """What a policy says of new tokens of one layer, and the cache."""
    rows, n, groups = k.shape[:3]
    positions = jnp.broadcast_to(first + jnp.arange(n)[None], (rows, n))
    cache = policy.init(rows, slots, groups, 4, jnp.float32) if cache is None else cache
    return policy.attend(cache, q, k, v, positions, plain_look(q, positions, groups))


run = jax.jit(attend, static_argnames=("policy", "slots"))


def masked(q, k, v, kept):
    """Attention over the pairs of `kept`, `[B, G, N, S]`, in float64."""
    q, k, v = (np.asarray(x, float) for x in (q, k, v))
    each = q.shape[2] // k.shape[2]
    logits = np.einsum("bnhd,bshd->bhns", q, np.repeat(k, each, 2))
    weights = np.where(np.repeat(kept, each, 1), np.exp(logits), 0)
    return np.einsum("bhns,bshd->bnhd", weights / weights.sum(-1, keepdims=True), np.repeat(v, each, 2))


@pytest.mark.parametrize("lengths", [None, (24, 19, 21)], ids=["full", "padded"])
def test_a_budget_for_all_is_dense_attention_bit_for_bit(tokens, lengths):
    plain, held, _ = stepwise(toy(), tokens, FIRST, lengths)
    logits, caches, _ = stepwise(toy(cache=DHSA(budget=SIZE, local=8, block=8)), tokens, FIRST, lengths)
    np.testing.assert_array_equal(logits, plain)
    np.testing.assert_array_equal(caches.keys, held.keys)


@pytest.mark.parametrize("lengths", [None, (24, 19, 21)], ids=["full", "padded"])
@pytest.mark.parametrize("boundaries", [Even(), Similarity(window=2, apart=2)], ids=["even", "similarity"])
def test_a_budget_for_the_text_reads_all_of_it(tokens, lengths, boundaries):
    """It is larger than the text though not than the cache: every chunk is gathered, in another order."""
    plain, _, _ = stepwise(toy(), tokens, FIRST, lengths)
    policy = DHSA(budget=30, local=4, block=4, chunk=3, boundaries=boundaries)
    logits, caches, _ = stepwise(toy(cache=policy), tokens, FIRST, lengths, slots=32)
    np.testing.assert_allclose(logits, plain, atol=2e-5)
    np.testing.assert_array_equal(jnp.sum(caches.state.count, axis=2)[0], lengths or [SIZE] * 3)


@pytest.mark.parametrize("budget", [1, 3])
def test_chunks_of_one_token_are_exact_top_k_attention(draw, budget):
    q, k, v = drawn(draw, 13)
    policy = DHSA(budget=budget, local=0, block=1, chunk=1, boundaries=Even())
    y, cache = run(policy, q, k, v, slots=20)
    mean = jnp.mean(q.reshape(2, 13, 2, 2, 4), axis=3)
    products = np.einsum("bngd,bsgd->bgns", np.asarray(mean, float), np.asarray(k, float))
    products = np.where(np.tril(np.ones((13, 13), bool)), products, -np.inf)
    kept = products >= -np.sort(-products, axis=3)[..., budget - 1 : budget]
    kept &= products > -np.inf
    np.testing.assert_allclose(y, masked(q, k, v, kept), atol=1e-5)
    # And so is the next token, by itself.
    more = drawn(draw, 1)
    y, cache = run(policy, *more, slots=20, cache=cache, first=13)
    k, v = (jnp.concatenate(both, axis=1) for both in ((k, more[1]), (v, more[2])))
    mean = jnp.mean(more[0].reshape(2, 1, 2, 2, 4), axis=3)
    products = np.einsum("bngd,bsgd->bgns", np.asarray(mean, float), np.asarray(k, float))
    kept = products >= -np.sort(-products, axis=3)[..., budget - 1 : budget]
    np.testing.assert_allclose(y, masked(more[0], k, v, kept), atol=1e-5)
    assert cache.state.made.tolist() == [14, 14]


@pytest.mark.parametrize("boundaries", [Even(), Similarity(window=1, apart=1)], ids=["even", "similarity"])
@pytest.mark.parametrize("n", [16, 21])
def test_it_reads_what_the_plain_form_keeps(draw, boundaries, n):
    """Blocks of queries, the last of them short: against importance over all pairs."""
    block, budget = 4, 10
    q, k, v = drawn(draw, n)
    policy = DHSA(budget=budget, local=4, block=block, chunk=3, boundaries=boundaries)
    y, _ = run(policy, q, k, v, slots=40)
    begins = boundaries.begins(k, jnp.ones((2, n), bool), 3)
    blocks = jnp.broadcast_to(jnp.arange(n) // block, (2, n))
    mean = jnp.mean(q.reshape(2, n, 2, 2, 4), axis=3)
    scores = importance(mean, k, blocks, chunk_numbers(begins))
    at = np.arange(n)
    end = np.minimum((at // block + 1) * block, n)  # [N]
    far = at[None, :] < (end - 4)[:, None]  # [N, S]
    kept = within_budget(scores, jnp.asarray(far)[None, None], budget - 4)
    kept = np.asarray(kept) | (~far & (at[None, :] < end[:, None]))
    kept &= np.tril(np.ones((n, n), bool))
    np.testing.assert_allclose(y, masked(q, k, v, kept), atol=1e-5)


def test_equal_chunks_are_block_sparse_attention(draw):
    """Whole blocks are read, and the last tokens."""
    policy = DHSA(budget=12, local=4, block=4, chunk=4, boundaries=Even())
    q, k, v = drawn(draw, 32)
    _, cache = run(policy, q, k, v, slots=40)
    mean = jnp.mean(q[:, -4:].reshape(2, 4, 2, 2, 4), axis=(1, 3))
    slots = np.asarray(policy.chosen(cache.state, mean, jnp.asarray([32, 32])))
    for row in range(2):
        for group in range(2):
            products = (
                np.asarray(k, float)[row, :28, group].reshape(7, 4, 4).sum(1)
                @ np.asarray(mean, float)[row, group]
            )
            best = np.argsort(-products)[:2]
            expected = [
                *range(best[0] * 4, best[0] * 4 + 4),
                *range(best[1] * 4, best[1] * 4 + 4),
                *range(28, 32),
            ]
            assert slots[row, :, group].tolist() == expected


def test_what_is_written_goes_into_chunks_of_the_mean_length(draw):
    policy = DHSA(budget=8, local=2, block=2, chunk=3, boundaries=Even())
    _, cache = run(policy, *drawn(draw, 7), slots=20)
    assert cache.state.begins[0, :4].tolist() == [0, 3, 6, 20]
    for at in range(7, 14):
        more = drawn(draw, 1)
        _, cache = run(policy, *more, slots=20, cache=cache, first=at)
    assert cache.state.begins[0].tolist() == [0, 3, 6, 9, 12, 20, 20, 20]
    assert cache.state.count[0, :5].tolist() == [3, 3, 3, 3, 2]
    sums = np.asarray(cache.keys[0, 9:12], float).sum(0)
    np.testing.assert_allclose(cache.state.sums[0, 3], sums, atol=1e-5)


def test_a_text_in_small_pieces_never_makes_more_chunks_than_there_is_room_for(draw):
    policy = DHSA(budget=8, local=2, block=2, chunk=5)
    cache = policy.init(2, 20, 2, 4, jnp.float32)
    for at in range(0, 20, 2):
        y, cache = run(policy, *drawn(draw, 2), slots=20, cache=cache, first=at)
    assert cache.state.begins.shape[1] == 6
    assert cache.state.made.tolist() == [6, 6]
    np.testing.assert_array_equal(jnp.sum(cache.state.count, axis=1), [20, 20])
    assert np.isfinite(y).all()


def test_it_says_something_else_than_everything(tokens):
    plain, _, _ = stepwise(toy(), tokens, FIRST)
    policy = DHSA(budget=8, local=2, block=2, chunk=3, boundaries=Even())
    logits, _, _ = stepwise(toy(cache=policy), tokens, FIRST)
    assert float(jnp.max(jnp.abs(logits - plain))) > 1e-3


def test_layers_apart_write_the_same():
    policy = DHSA(budget=6, local=2, block=1, chunk=2, boundaries=Similarity(window=1, apart=0))
    model = toy(cache=policy)
    rows, lengths = left_pad([[3, 1, 4, 1, 5, 9, 2, 6, 5], [9, 2, 7]])
    options = (9, jax.random.key(0), Sampling(temperature=0.0))
    texts = generate(model, variables(), rows, lengths, *options)
    np.testing.assert_array_equal(
        generate(model, model.layers_apart(variables()), rows, lengths, *options), texts
    )
    # Nor does a text depend on its neighbours.
    alone = generate(model, variables(), *left_pad([[9, 2, 7]]), *options, slots=17)
    np.testing.assert_array_equal(alone[0], texts[1])


def test_a_config_names_it():
    cache = dict(kind="dhsa", budget=64, local=16, block=16, boundaries=dict(kind="even"))
    model = build(LM, dict(block=BLOCK, vocab=17, dim=16, depth=2, cache=cache), "model")
    assert model.cache == DHSA(64, 16, 16, boundaries=Even())
    assert dataclasses.replace(model.cache, boundaries=Similarity()) == DHSA(64, 16, 16)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (dict(budget=128), "budget=128 must exceed local=128"),
        (dict(chunk=0), "chunk=0 must be at least 1"),
        (dict(local=8), "local=8 must be at least block=128"),
    ],
)
def test_bad_input(fields, said):
    with pytest.raises(UsageError, match=said):
        DHSA(**fields)
