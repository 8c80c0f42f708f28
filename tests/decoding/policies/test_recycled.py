import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.config import build
from effjax.decoding.cache import EMPTY
from effjax.decoding.generate import generate, left_pad
from effjax.decoding.policies.recycled import NOTHING, RecycledAttention
from effjax.decoding.sampling import Sampling
from effjax.errors import UsageError
from effjax.models.lm import LM
from tests.decoding.policies.common import BLOCK, plain_look, stepwise, toy, variables

SIZE = 20
FIRST = 6


@pytest.fixture
def tokens(draw):
    return draw.integers(0, 17, (3, SIZE))


def stepping(policy, groups=2, width=4, slots=32):
    """One layer step by step: `step(cache, query, key, value)` with a look that is plain attention."""

    @jax.jit
    def step(cache, query, key, value):
        position = jnp.broadcast_to(cache.written, (query.shape[0], 1))
        look = plain_look(query, position, groups)
        return policy.attend(cache, query, key, value, position, look)

    return policy.init(1, slots, groups, width, jnp.float32), step


@pytest.mark.parametrize("lengths", [None, (20, 11, 17)], ids=["full", "padded"])
@pytest.mark.parametrize("policy", [RecycledAttention(8, stride=1), RecycledAttention(SIZE, stride=5)])
def test_every_step_full_or_room_for_all_is_full_decoding_bit_for_bit(tokens, policy, lengths):
    plain, held, _ = stepwise(toy(), tokens, FIRST, lengths)
    logits, caches, _ = stepwise(toy(cache=policy), tokens, FIRST, lengths)
    np.testing.assert_array_equal(logits, plain)
    np.testing.assert_array_equal(caches.keys, held.keys)


@pytest.mark.parametrize("lengths", [None, (20, 16, 17)], ids=["full", "padded"])
def test_a_record_of_everything_tells_the_same_as_everything(tokens, lengths):
    """It holds the text though not the cache: the other branch, the same result."""
    plain, _, _ = stepwise(toy(), tokens, FIRST, lengths)
    policy = RecycledAttention(SIZE, stride=4, pool=3)
    logits, caches, _ = stepwise(toy(cache=policy), tokens, FIRST, lengths, slots=30)
    np.testing.assert_allclose(logits, plain, atol=2e-5)
    assert caches.state.slots.shape == (2, 3, SIZE, 2)


def test_nothing_is_evicted_and_something_else_is_said(tokens):
    plain, held, _ = stepwise(toy(), tokens, FIRST)
    logits, caches, _ = stepwise(toy(cache=RecycledAttention(4, stride=4, pool=1)), tokens, FIRST)
    np.testing.assert_array_equal(caches.positions, held.positions)
    np.testing.assert_array_equal(caches.keys[0], held.keys[0])
    # The first step after the prompt and every fourth one see everything, in the first layer at least.
    np.testing.assert_allclose(logits[:, :2], plain[:, :2], atol=1e-6)
    assert float(jnp.max(jnp.abs(logits[:, 2:] - plain[:, 2:]))) > 1e-3


@pytest.mark.parametrize("stride", [2, 3, 5])
def test_a_full_step_every_stride_and_so_many_keys_in_between(draw, stride):
    policy = RecycledAttention(budget=6, stride=stride, pool=1)
    cache, step = stepping(policy)
    read = []
    for _ in range(4 * stride):
        cache = step(cache, *(jnp.asarray(draw.normal(size=(1, 1, h, 4)), jnp.float32) for h in (4, 2, 2)))[1]
        read.append(cache.slots if int(cache.state.since[0]) == 0 else cache.state.slots.shape[1])
    assert read == ([cache.slots] + [6] * (stride - 1)) * 4
    assert np.mean(read) == policy.attended(cache.slots) == (32 + (stride - 1) * 6) / stride


def test_the_record_is_the_most_attended_and_the_tokens_since(draw):
    """Against sorted weights in NumPy, the largest of the heads of a group; and always part of the cache."""
    policy = RecycledAttention(budget=5, stride=4, pool=1)
    cache, step = stepping(policy)
    keys, recorded = [], None
    for at in range(17):
        query, key, value = (jnp.asarray(draw.normal(size=(1, 1, h, 4)) * 2, jnp.float32) for h in (4, 2, 2))
        keys.append(np.asarray(key[0, 0], float))
        _, cache = step(cache, query, key, value)
        slots = np.asarray(cache.state.slots[0])  # [K, G]
        known = slots[slots != NOTHING]
        assert known.min() >= 0
        assert known.max() <= at
        if at % 4 == 0:
            logits = np.einsum(
                "ghd,sgd->ghs", np.asarray(query[0, 0], float).reshape(2, 2, 4), np.stack(keys)
            )
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            worth = (weights / weights.sum(-1, keepdims=True)).max(1)  # [G, S]
            recorded = np.argsort(-worth, axis=1)[:, :5]
        for group in range(2):
            new = list(range(at - at % 4 + 1, at + 1))
            kept = recorded[group].tolist()
            kept += [NOTHING] * (5 - len(kept))
            kept = kept[: 5 - len(new)] + new[::-1]
            assert sorted(slots[:, group].tolist()) == sorted(kept)
            assert len(set(slots[:, group].tolist()) - {NOTHING}) == np.sum(slots[:, group] != NOTHING)


def test_a_recycled_step_is_attention_over_its_record(draw):
    policy = RecycledAttention(budget=5, stride=4, pool=1)
    cache, step = stepping(policy)
    for _ in range(11):
        query, key, value = (jnp.asarray(draw.normal(size=(1, 1, h, 4)), jnp.float32) for h in (4, 2, 2))
        y, cache = step(cache, query, key, value)
    assert int(cache.state.since[0]) == 2
    slots = np.asarray(cache.state.slots[0])
    for head in range(4):
        group = head // 2
        rows = slots[:, group]
        k, v = (np.asarray(part[0, rows, group], float) for part in (cache.keys, cache.values))
        weights = np.exp(k @ np.asarray(query[0, 0, head], float))
        np.testing.assert_allclose(y[0, 0, head], weights @ v / weights.sum(), atol=1e-5)


def test_neighbours_share_their_largest_weight():
    policy = RecycledAttention(budget=3, stride=2, pool=3)
    weights = jnp.asarray([0.1, 0.02, 0.03, 0.6, 0.04, 0.05, 0.06, 0.1])[None, None, None]
    held = jnp.asarray([[-1, 0, 1, 2, 3, 4, 5, EMPTY]])
    assert sorted(policy.recorded(weights, held, 1)[0, :, 0].tolist()) == [2, 3, 4]
    alone = dataclasses.replace(policy, pool=1)
    assert alone.recorded(weights, held, 1)[0, :, 0].tolist() == [3, 6, 5]


def turned(degrees):
    angle = np.deg2rad(degrees)
    row = jnp.asarray([np.cos(angle), np.sin(angle), 0.0, 0.0], jnp.float32)
    return jnp.broadcast_to(row, (1, 1, 4, 4))


def test_a_full_step_waits_until_the_query_has_turned_away():
    """Considered at every third step alone; cos 30 > 0.8 > cos 40."""
    policy = RecycledAttention(budget=8, stride=3, threshold=0.8, pool=1)
    cache, step = stepping(policy)
    full = []
    for degrees in (0, 90, 90, 30, 90, 0, 40, 40, 40, 40, 81):
        cache = step(cache, turned(degrees), jnp.ones((1, 1, 2, 4)), jnp.ones((1, 1, 2, 4)))[1]
        full.append(int(cache.state.since[0]) == 0)
    assert full == [True, False, False, False, False, False, True, False, False, False, False]


def test_every_sequence_makes_its_own_full_steps(draw):
    """With a threshold they are at different times, and each is what it is alone."""
    model = toy(cache=RecycledAttention(5, stride=2, threshold=0.0, pool=1))
    tokens = draw.integers(0, 17, (3, SIZE))
    together, caches, _ = stepwise(model, tokens, FIRST)
    for row in range(3):
        alone, held, _ = stepwise(model, tokens[row : row + 1], FIRST)
        np.testing.assert_allclose(together[row], alone[0], atol=1e-5)
        np.testing.assert_array_equal(caches.state.since[:, row], held.state.since[:, 0])
    assert len(np.unique(np.asarray(caches.state.since), axis=1).T) > 1


def test_a_record_that_is_never_renewed_keeps_the_latest(draw):
    policy = RecycledAttention(budget=4, stride=2, threshold=-1.0, pool=1)
    cache, step = stepping(policy)
    for _ in range(11):
        cache = step(cache, turned(0), jnp.ones((1, 1, 2, 4)), jnp.ones((1, 1, 2, 4)))[1]
    assert sorted(cache.state.slots[0, :, 0].tolist()) == [7, 8, 9, 10]


def test_layers_apart_and_any_draws_write_the_same(draw):
    model = toy(cache=RecycledAttention(4, stride=3, pool=1))
    rows, lengths = left_pad([[3, 1, 4, 1, 5], [9, 2]])
    options = (12, jax.random.key(0), Sampling(temperature=0.0))
    texts = generate(model, variables(), rows, lengths, *options)
    apart = generate(model, model.layers_apart(variables()), rows, lengths, *options)
    np.testing.assert_array_equal(texts, apart)


def test_a_config_names_it():
    cache = dict(kind="recycled", budget=64, stride=5, threshold=0.85)
    model = build(LM, dict(block=BLOCK, vocab=17, dim=16, depth=2, cache=cache), "model")
    assert model.cache == RecycledAttention(64, stride=5, threshold=0.85)
    assert model.cache.attended(1000) == (1000 + 4 * 64) / 5


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (dict(stride=0), "stride=0 must be at least 1"),
        (dict(budget=4, stride=5), "budget=4 slots do not hold the tokens of stride=5"),
        (dict(threshold=1.5), "threshold=1.5 is compared with a cosine"),
        (dict(pool=4), "pool=4 must be an odd number"),
    ],
)
def test_bad_input(fields, said):
    with pytest.raises(UsageError, match=said):
        RecycledAttention(**fields)
