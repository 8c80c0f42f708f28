import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.config import build
from effjax.decoding.policies.heavy_hitters import HeavyHitters
from effjax.decoding.policies.kvmerger import (
    ALONE,
    HEAVY,
    KVMerger,
    begin_sets,
    filled,
    merge_sets,
    neighbour_similarity,
)
from effjax.decoding.storage.quantised import Quantised
from effjax.errors import UsageError
from effjax.models.lm import LM
from tests.decoding.policies.common import BLOCK, stepwise, toy

SIZE = 14
SMALL = KVMerger(budget=8, sinks=1, recent=2, heavy=1, reserve=2)


@pytest.fixture
def tokens(draw):
    return draw.integers(0, 17, (3, SIZE))


def prompt(policy, keys, values, queries, cache=None):
    """What a policy holds of a prompt whose heads are alike in all but their keys."""
    batch, count, groups, size = keys.shape

    def look(keys, values, held, counts=None, among=None, tell=False, part=None):
        assert part is None
        logits = jnp.einsum("bngd,bsgd->bgns", queries, keys) / size**0.5
        logits += 0.0 if counts is None else jnp.log(counts).swapaxes(1, 2)[:, :, None]
        seen = jnp.moveaxis(held, 2, 1)[:, :, None]
        places = start + jnp.arange(count)[None, None, :, None]
        weights = jax.nn.softmax(jnp.where((seen >= 0) & (seen <= places), logits, -jnp.inf))
        return jnp.einsum("bgns,bsgd->bngd", weights, values), weights

    start = 0 if cache is None else int(cache.written)
    cache = policy.init(batch, 999, groups, size, keys.dtype) if cache is None else cache
    positions = jnp.broadcast_to(start + jnp.arange(count)[None], (batch, count))
    return jax.jit(policy.attend, static_argnums=5)(cache, queries, keys, values, positions, look)[1]


def drifting(draw, count, size=8, rank=3, groups=2):
    """Keys of low rank that change slowly, with jumps, as in a text of several parts."""
    steps = draw.normal(size=(count, groups, rank)) * 0.15
    steps[:: count // 8] = draw.normal(size=steps[:: count // 8].shape) * 2
    part = np.cumsum(steps, 0) @ draw.normal(size=(rank, size))
    return jnp.asarray(part[None] * 1.5 / part.std(), jnp.float32)


def normal(draw, *shape):
    return jnp.asarray(draw.normal(size=shape), jnp.float32)


def held(cache):
    """Positions, sizes, keys and values of each head, of the slots that hold something."""
    for head in range(cache.positions.shape[2]):
        some = np.asarray(cache.positions[0, :, head]) >= 0
        yield tuple(
            np.asarray(x[0, :, head])[some] for x in (cache.positions, cache.size, cache.keys, cache.values)
        )


@pytest.mark.parametrize("proportional", [False, True])
def test_room_for_all_is_the_cache_that_keeps_all_bit_for_bit(tokens, proportional):
    lengths = (14, 9, 12)
    plain, whole, _ = stepwise(toy(), tokens, 6, lengths)
    logits, caches, _ = stepwise(
        toy(cache=KVMerger(budget=99, proportional=proportional)), tokens, 6, lengths
    )
    np.testing.assert_array_equal(logits, plain)
    np.testing.assert_array_equal(caches.keys, whole.keys)


def test_an_epsilon_of_one_merges_nothing_that_fits(draw):
    keys = jnp.repeat(normal(draw, 1, 6, 2, 4), 2, axis=1)  # neighbours that are the same
    like, everywhere = neighbour_similarity(keys), jnp.ones((1, 12, 2), bool)
    ranks = jnp.zeros((1, 12, 2), int)
    assert begin_sets(like, ranks, everywhere, 1.0, 12).all()
    assert not begin_sets(like, ranks, everywhere, 0.999, 12).all()


def walk(likeness, ranks, epsilon):
    """From the last token to the first, as the paper has it."""
    sets = [[len(likeness) - 1]]
    for i in reversed(range(len(likeness) - 1)):
        if likeness[i + 1] > epsilon and not ranks[i] and not ranks[i + 1]:
            sets[-1].append(i)
        else:
            sets.append([i])
    return sorted(min(one) for one in sets)


def test_sets_are_those_of_a_walk_from_the_last_to_the_first(draw):
    keys = drifting(draw, 40)
    ranks = jnp.asarray(draw.random((1, 40, 2)) < 0.2, int) * HEAVY
    like = neighbour_similarity(keys)
    begins = begin_sets(like, ranks, jnp.ones((1, 40, 2), bool), 0.75, 40)
    for head in range(2):
        expected = walk(like[0, :, head], ranks[0, :, head], 0.75)
        assert np.flatnonzero(begins[0, :, head]).tolist() == expected
        assert 12 < len(expected) < 40
    key = np.asarray(keys[0, :, 0], np.float64)
    cosine = (key[1:] * key[:-1]).sum(1) / np.linalg.norm(key[1:], axis=1) / np.linalg.norm(key[:-1], axis=1)
    np.testing.assert_allclose(like[0, 1:, 0], cosine, atol=1e-6)


def test_a_head_with_too_many_sets_merges_what_is_most_alike(draw):
    likeness = jnp.asarray(draw.uniform(-1, 1, (1, 20, 2)), jnp.float32)
    ranks = jnp.zeros((1, 20, 2), int).at[:, 4].set(ALONE).at[:, 10].set(HEAVY)
    begins = begin_sets(likeness, ranks, jnp.ones((1, 20, 2), bool), 0.9, 9)
    for head in range(2):
        found = set(np.flatnonzero(begins[0, :, head]))
        assert len(found) == 9
        assert {0, 4, 5, 10, 11} < found
        others = [i for i in np.argsort(likeness[0, :, head]) if i not in (0, 4, 5, 10, 11)]
        assert found == {0, 4, 5, 10, 11, *others[:4]}
    few = begin_sets(likeness, ranks, jnp.ones((1, 20, 2), bool), 0.9, 3)
    assert (np.flatnonzero(few[0, :, 0]) == [0, 4, 5]).all()  # no room for heavy ones


@pytest.mark.parametrize("count", [30, 61])
def test_sets_are_runs_of_all_tokens_and_leave_first_and_latest_alone(draw, count):
    policy = KVMerger(budget=16, sinks=2, recent=4, heavy=3, reserve=3)
    keys, values, queries = drifting(draw, count), normal(draw, 1, count, 2, 8), normal(draw, 1, count, 2, 8)
    cache = prompt(policy, keys, values, queries)
    for head, (last, size, k, v) in enumerate(held(cache)):
        assert len(last) <= 13
        # A set ends at its last token and begins behind that of the one before it.
        np.testing.assert_array_equal(np.diff(last, prepend=-1), size)
        assert last[-1] == count - 1
        single = [0, 1, *range(count - 4, count)]
        assert set(single) <= set(last[size == 1])
        at = np.searchsorted(last, single)
        np.testing.assert_array_equal(k[at], keys[0, single, head])
        np.testing.assert_array_equal(v[at], values[0, single, head])
    assert (np.asarray(cache.size).sum(1) - np.asarray(cache.positions < 0).sum(1) == count).all()


def test_merging_is_that_of_numpy(draw):
    sizes = [1, 3, 2, 4, 1]
    sets = np.repeat(np.arange(5), sizes)
    keys, values = draw.normal(size=(2, 11, 4))
    size, score = draw.integers(1, 4, 11), draw.random(11)
    expected = []
    for one in range(5):
        k, v, s = (x[sets == one].astype(np.float64) for x in (keys, values, size))
        pivot = np.argmax(score[sets == one])
        far = np.linalg.norm(k - k[pivot], axis=1)
        others = s.sum() - s[pivot]
        sigma = (s * far).sum() / others / np.sqrt(2) if others else 1.0
        weights = s * np.exp(-(far**2) / (2 * sigma**2))
        weights /= weights.sum()
        expected.append((weights @ k, weights @ v))
    row = lambda x: jnp.asarray(x)[None, :, None].astype(jnp.float32)
    padded = jnp.asarray(np.where(np.arange(11) == 10, 7, sets))[None, :, None]  # the last is in no set
    found = jax.jit(merge_sets, static_argnums=5)(
        row(keys), row(values), row(size), row(score), padded.astype(jnp.int32), 7
    )
    for part, name in enumerate(("keys", "values")):
        np.testing.assert_allclose(
            found[part][0, :4, 0], [one[part] for one in expected[:4]], rtol=1e-5, err_msg=name
        )
        np.testing.assert_array_equal(found[part][0, 4:], 0.0)
    np.testing.assert_array_equal(found[0][0, 0, 0], row(keys)[0, 0, 0])  # a set of one


def test_a_set_of_equal_keys_is_that_key_and_the_mean_of_the_values(draw):
    keys = jnp.broadcast_to(normal(draw, 1, 1, 1, 4), (1, 6, 1, 4))
    values, one = normal(draw, 1, 6, 1, 4), jnp.ones((1, 6, 1))
    found = merge_sets(keys, values, one, one, jnp.zeros((1, 6, 1), jnp.int32), 1)
    np.testing.assert_allclose(found[0], keys[:, :1], rtol=1e-6)
    np.testing.assert_allclose(found[1], jnp.mean(values, 1, keepdims=True), rtol=1e-5, atol=1e-6)


def errors(draw, epsilon, count=96, budget=32):
    """Mean squared error of what later queries take, of each policy, relative to that of nothing at all."""
    keys = drifting(draw, count)
    queries, values = normal(draw, 1, count, 2, 8), normal(draw, 1, count, 2, 8) * 0.3 + keys
    asked = draw.normal(size=(200, 8))

    def taken(k, v, bias):
        logits = asked @ np.float64(k).T / 8**0.5 + bias
        weights = np.exp(logits - logits.max(1, keepdims=True))
        return weights / weights.sum(1, keepdims=True) @ np.float64(v)

    truth = [taken(keys[0, :, head], values[0, :, head], 0.0) for head in range(2)]
    merging = KVMerger(budget, epsilon=epsilon, sinks=1, recent=8, heavy=4, reserve=1)
    found = {}
    for name, policy in {"evicting": HeavyHitters(budget, recent=8), "merging": merging}.items():
        cache = prompt(policy, keys, values, queries)
        if name == "evicting":
            cache = dataclasses.replace(cache, size=jnp.ones(cache.positions.shape))
        for counts in (False, True):
            off = [
                np.mean((taken(k, v, np.log(size) if counts else 0.0) - truth[head]) ** 2)
                for head, (_, size, k, v) in enumerate(held(cache))
            ]
            found[name, counts] = np.mean(off) / np.mean(np.square(truth))
    return found


@pytest.mark.parametrize(("epsilon", "counted"), [(0.75, 1.0), (0.95, 0.6)])
def test_merging_is_nearer_than_evicting_and_nearer_still_with_the_size_of_sets(epsilon, counted):
    """Large sets are far from all their tokens: there the size helps on average, and not each time."""
    found = [errors(np.random.default_rng(seed), epsilon) for seed in (0, 1, 2)]
    assert all(one["merging", False] < one["evicting", False] for one in found)
    mean = lambda counts: np.mean([one["merging", counts] for one in found])
    assert mean(True) < counted * mean(False)


def test_a_full_cache_merges_in_one_go_and_then_has_room(tokens):
    _, caches, _ = stepwise(toy(cache=SMALL), tokens, 2)
    assert caches.keys.shape[2] == 8
    sums = np.where(np.asarray(caches.positions) >= 0, caches.size, 0).sum(2)
    np.testing.assert_array_equal(sums, SIZE)  # every token is in a set
    counts = filled(caches.positions.reshape(6, 8, 2))
    assert (counts <= 8).all()
    newest = np.sort(np.asarray(caches.positions), axis=2)[:, :, -2:]
    np.testing.assert_array_equal(newest, np.broadcast_to([[12], [13]], newest.shape))


def test_room_is_made_for_so_many_steps(draw):
    """With an epsilon that merges nothing by itself a merge leaves the reserve free, and not more."""
    policy = dataclasses.replace(SMALL, epsilon=1.0)
    keys = normal(draw, 1, 12, 2, 4)
    cache, counts = policy.init(1, 99, 2, 4, jnp.float32), []

    @jax.jit
    def add(cache, k, position):
        look = lambda keys, values, held, *_, **__: (jnp.zeros((1, 1, 2, 4)), jnp.ones((1, 2, 1, 8)))
        return policy.attend(cache, k, k, k, position, look)[1]

    for at in range(12):
        cache = add(cache, keys[:, at : at + 1], jnp.full((1, 1), at))
        counts.append(filled(cache.positions)[0].tolist())
    assert counts == [[n, n] for n in [1, 2, 3, 4, 5, 6, 7, 8, 7, 8, 7, 8]]


def test_sets_of_heads_differ(tokens):
    _, caches, _ = stepwise(toy(cache=SMALL), tokens, 10)
    assert not np.array_equal(*np.moveaxis(np.asarray(caches.positions), 3, 0))


def test_a_text_does_not_depend_on_the_padding_before_it(tokens):
    """Its row is full at another step than others, and only then its heads merge."""
    lengths = (14, 11, 13)
    together, caches, _ = stepwise(toy(cache=SMALL), tokens, 6, lengths)
    alone, own, _ = stepwise(toy(cache=SMALL), tokens[1:2, 3:], 3)
    np.testing.assert_allclose(together[1], alone[0], atol=1e-5)
    np.testing.assert_array_equal(
        np.sort(caches.positions[:, 1], 1)[:, 2:], np.sort(own.positions[:, 0], 1)[:, 2:]
    )


def test_several_tokens_that_do_not_fit_are_read_whole_and_merged(draw):
    keys, values = drifting(draw, 18), normal(draw, 1, 18, 2, 8)
    cache = prompt(SMALL, keys[:, :6], values[:, :6], keys[:, :6])
    np.testing.assert_array_equal(cache.positions[0, :, 0], [0, 1, 2, 3, 4, 5, *cache.positions[0, 6:, 0]])
    cache = prompt(SMALL, keys[:, 6:11], values[:, 6:11], keys[:, 6:11], cache)
    for last, size, _, _ in held(cache):
        np.testing.assert_array_equal(np.diff(last, prepend=-1), size)
        assert last[-1] == 10
        assert len(last) <= 6


def test_merged_slots_may_be_quantised(tokens):
    plain, exact, _ = stepwise(toy(cache=SMALL), tokens, 10)
    storage = Quantised(8, "token", group=4, residual=0)
    logits, caches, _ = stepwise(toy(cache=dataclasses.replace(SMALL, storage=storage)), tokens, 10)
    np.testing.assert_allclose(logits, plain, atol=0.1)
    assert caches.keys.codes.shape == (2, 3, 8, 2, 4)
    assert caches.keys.codes.dtype == jnp.uint8
    np.testing.assert_array_equal(np.where(caches.positions >= 0, caches.size, 0).sum(2), SIZE)
    bytes_of = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    assert bytes_of(caches.keys) == 3 * bytes_of(exact.keys) // 4  # heads of 4 channels: codes are a quarter


def test_a_config_names_it():
    section = dict(kind="kvmerger", budget=64, epsilon=0.8, storage=dict(kind="quantised", residual=128))
    model = build(LM, dict(block=BLOCK, vocab=17, dim=16, depth=2, cache=section), "model")
    assert model.cache == KVMerger(64, epsilon=0.8, storage=Quantised())
    assert model.cache.amounts() == (21, 16, 8)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: KVMerger(epsilon=1.5), "epsilon=1.5 must be a cosine"),
        (lambda: KVMerger(sinks=-1), "sinks=-1 must be at least 0"),
        (lambda: KVMerger(recent=0), "recent=0 must be at least 1"),
        (lambda: KVMerger(heavy=-1), "heavy=-1 must be at least 0"),
        (lambda: KVMerger(reserve=0), "reserve=0 must be at least 1"),
        (
            lambda: KVMerger(6),
            "budget=6 slots hold no merged ones beside sinks=4, recent=2 and reserve=1: give more slots",
        ),
        (
            lambda: KVMerger(storage=Quantised()).init(1, 9, 1, 64, jnp.float32),
            "evicts or merges needs quantised storage with keys='token'",
        ),
    ],
)
def test_bad_input(make, said):
    with pytest.raises(UsageError, match=said):
        make()
