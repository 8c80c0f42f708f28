import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.config import build
from effjax.decoding.cache import EMPTY
from effjax.decoding.policies import taken as taken_module
from effjax.decoding.policies.heavy_hitters import HeavyHitters
from effjax.decoding.policies.kinds import POLICIES
from effjax.decoding.policies.kvmerger import KVMerger
from effjax.decoding.policies.policy import Policy
from effjax.decoding.policies.taken import look_and_sum
from effjax.decoding.policies.window import Window
from effjax.errors import UsageError
from effjax.models.lm import LM
from tests.decoding.policies.common import BLOCK, plain_look, stepwise, toy, variables

SIZE = 14
EVICTING = {"window": Window, "heavy_hitters": HeavyHitters}


@pytest.fixture
def tokens(draw):
    return draw.integers(0, 17, (3, SIZE))


@pytest.mark.parametrize("lengths", [None, (14, 9, 12)], ids=["full", "padded"])
@pytest.mark.parametrize("kind", EVICTING)
def test_room_for_all_is_the_cache_that_keeps_all_bit_for_bit(tokens, kind, lengths):
    plain, held, _ = stepwise(toy(), tokens, 6, lengths)
    logits, caches, _ = stepwise(toy(cache=EVICTING[kind](budget=SIZE)), tokens, 6, lengths)
    np.testing.assert_array_equal(logits, plain)
    np.testing.assert_array_equal(caches.keys, held.keys)


@pytest.mark.parametrize("kind", EVICTING)
def test_a_smaller_budget_holds_so_many_slots_and_says_something_else(tokens, kind):
    plain, held, _ = stepwise(toy(), tokens, 6)
    logits, caches, _ = stepwise(toy(cache=EVICTING[kind](budget=6)), tokens, 6)
    assert caches.keys.shape[2] == 6
    assert held.keys.shape[2] == SIZE
    np.testing.assert_allclose(logits[:, 0], plain[:, 0], atol=1e-6)  # the prompt was read whole
    assert float(jnp.max(jnp.abs(logits[:, 3:] - plain[:, 3:]))) > 1e-3


@pytest.mark.parametrize("first", [2, 5, 11])
def test_a_window_holds_the_first_and_the_last(tokens, first):
    lengths = [14, 9, 12]
    _, caches, _ = stepwise(toy(cache=Window(budget=5, sinks=2)), tokens, first, lengths)
    for row, length in enumerate(lengths):
        for layer in range(2):
            found = sorted(caches.positions[layer, row].tolist())
            assert found == [0, 1, length - 3, length - 2, length - 1]


def test_a_window_is_a_sliding_window_where_there_are_no_sinks(tokens):
    """The layer above sees what the layer below told before it was evicted, as a mixer's window does."""
    mixer = BLOCK["mixer"] | dict(window=4)
    slid, _, _ = stepwise(toy(block=BLOCK | dict(mixer=mixer)), tokens, 1)
    logits, _, _ = stepwise(toy(cache=Window(budget=4, sinks=0)), tokens, 1)
    np.testing.assert_allclose(logits, slid, atol=2e-5)


def test_heavy_hitters_are_those_of_the_largest_sums(draw):
    """Against sums in NumPy, of every head by itself, with a prompt that does not fit."""
    policy = HeavyHitters(budget=5, recent=2)
    n, groups = 9, 2
    cache = policy.init(1, 20, groups, 4, jnp.float32)
    weights = draw.dirichlet(np.ones(n + 5), (1, 4, n)).astype(np.float32)

    def look(keys, values, held, size=None, among=None, tell=False, part=None):
        assert tell
        assert part is None
        assert keys.shape[1] == 5 + n
        return jnp.zeros((1, n, 4, 4)), jnp.asarray(weights)

    keys = jnp.asarray(draw.normal(size=(1, n, groups, 4)), jnp.float32)
    queries = jnp.zeros((1, n, 4, 4))
    attend = jax.jit(lambda cache: policy.attend(cache, queries, keys, keys, jnp.arange(n)[None], look))
    _, cache = attend(cache)
    sums = weights.reshape(2, 2, n, n + 5).astype(float).sum((1, 2))[:, 5:]
    for group in range(groups):
        heaviest = np.argsort(-sums[group, : n - 2])[:3]
        expected = sorted([*heaviest, n - 2, n - 1])
        assert sorted(cache.positions[0, :, group].tolist()) == expected
        np.testing.assert_array_equal(cache.keys[0, :, group], keys[0, np.sort(expected), group])
        np.testing.assert_allclose(cache.score[0, :, group], sums[group, np.sort(expected)], rtol=1e-5)


def test_the_least_attended_makes_room(draw):
    policy = HeavyHitters(budget=4, recent=1)
    cache = policy.init(1, 9, 1, 2, jnp.float32)
    positions = jnp.arange(4)[None, :, None]
    score = jnp.asarray([3.0, 1.0, 2.0, 0.5])[None, :, None]
    cache = dataclasses.replace(cache, positions=positions, score=score)
    new = jnp.full((1, 1, 1, 2), 7.0)
    cache = policy.add(cache, new, new, jnp.asarray([[4]]))
    # 3 is no longer among the latest once 4 is there, and was attended to least.
    assert cache.positions[0, :, 0].tolist() == [0, 1, 2, 4]
    np.testing.assert_array_equal(cache.score[0, :, 0], [3.0, 1.0, 2.0, 0.0])
    np.testing.assert_array_equal(cache.keys[0, 3, 0], [7.0, 7.0])


def test_what_padding_attends_to_counts_for_nothing(tokens):
    model = toy(cache=HeavyHitters(budget=SIZE))
    step = jax.jit(functools.partial(model.apply, method="step"))
    places = jnp.broadcast_to(jnp.arange(SIZE)[None], tokens.shape)
    _, padded = step(variables(), tokens, model.init_cache(3, SIZE), places - 4)
    _, alone = step(variables(), tokens[:, 4:], model.init_cache(3, SIZE), places[:, :-4])
    np.testing.assert_allclose(padded.score[:, :, 4:], alone.score[:, :, :-4], atol=1e-5)


@pytest.mark.parametrize("policy", [HeavyHitters(budget=6), KVMerger(budget=6, sinks=1, epsilon=0.3)])
def test_blocks_of_a_prompt_sum_to_the_whole(monkeypatch, tokens, policy):
    """Of 10 tokens 4 look at a time, and 2; the second layer reads what the first made of them."""
    held = {}
    for most in (2**26, 10):
        monkeypatch.setattr(taken_module, "LOGITS_AT_ONCE", most)
        monkeypatch.setattr(taken_module, "BLOCK", 4)
        held[most] = stepwise(toy(cache=policy), tokens, 10, [14, 9, 12])
    (whole, after, _), (blocks, by_blocks, _) = held.values()
    np.testing.assert_allclose(blocks, whole, atol=2e-5)
    np.testing.assert_array_equal(by_blocks.positions, after.positions)
    np.testing.assert_allclose(by_blocks.score, after.score, atol=2e-5)


def test_blocks_sum_what_is_taken(draw):
    """Against the sums of all weights in NumPy, in every cut of the queries."""
    n, slots, groups = 11, 13, 2
    positions = jnp.broadcast_to(jnp.arange(n)[None] + 2, (2, n))
    query = jnp.asarray(draw.normal(size=(2, n, 4, 5)), jnp.float32)
    keys, values = (jnp.asarray(draw.normal(size=(2, slots, groups, 5)), jnp.float32) for _ in range(2))
    held = jnp.broadcast_to(jnp.arange(slots)[None], (2, slots))
    look = plain_look(query, positions, groups)
    _, weights = look(keys, values, held, tell=True)
    sums = np.asarray(weights, float).reshape(2, groups, 2, n, slots).sum((2, 3))
    y, _ = look(keys, values, held)
    for block in (1, 3, 4, 10, 11, 12):
        run = jax.jit(lambda: look_and_sum(look, keys, values, held, None, n, block))  # noqa: B023
        taken_y, taken = run()
        np.testing.assert_allclose(taken, np.moveaxis(sums, 1, 2), rtol=1e-5)
        np.testing.assert_allclose(taken_y, y, atol=1e-6)


def test_a_prompt_of_16k_tokens_needs_no_square():
    """All weights of 4 heads would be 4.3 GB; what is compiled says how much it takes."""
    model, tokens = toy(cache=HeavyHitters(budget=64), depth=1), 2**14
    shapes = jax.eval_shape(lambda: model.init_cache(1, tokens))
    prompt = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    held = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 2), jnp.int32))
    step = jax.jit(functools.partial(model.apply, method="step"))
    memory = step.lower(meta.unbox(held), prompt, shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 3e8


def test_heavy_hitters_of_heads_differ(tokens):
    _, caches, _ = stepwise(toy(cache=HeavyHitters(budget=6)), tokens, 6)
    assert not np.array_equal(*np.moveaxis(np.asarray(caches.positions), 3, 0))


def test_padding_goes_before_any_token(tokens):
    _, _, caches = stepwise(toy(cache=HeavyHitters(budget=6)), tokens, 10, [14, 9, 12])
    held = np.sort(np.asarray(caches.positions), axis=2)
    assert held[:, 1, 0].max() < 0  # 5 tokens, 6 slots
    assert (held[:, 1, 1:] == np.arange(5)[None, :, None]).all()
    assert held[:, 0].min() >= 0


def test_padding_attends_to_nothing(tokens):
    """The scores of a padded prompt are those of the prompt alone."""
    cache = HeavyHitters(budget=9)
    _, padded, _ = stepwise(toy(cache=cache), tokens[:1], 13, [9])
    _, alone, _ = stepwise(toy(cache=cache), tokens[:1, 5:], 8)
    for layer in range(2):
        for group in range(2):
            at = lambda held, which: np.asarray(getattr(held, which)[layer, 0, :, group])  # noqa: B023
            expected = dict(zip(at(alone, "positions"), at(alone, "score"), strict=True))
            found = dict(zip(at(padded, "positions"), at(padded, "score"), strict=True))
            np.testing.assert_allclose(
                [found[i] for i in range(8)], [expected[i] for i in range(8)], rtol=1e-5
            )


def test_empty_slots_go_first():
    cache = Window(budget=5).init(1, 9, 1, 2, jnp.float32)
    new = jnp.ones((1, 3, 1, 2))
    cache = Window(budget=5).add(cache, new, new, jnp.asarray([[-2, -1, 0]]))
    assert cache.positions[0].tolist() == [-2, -1, 0, EMPTY, EMPTY]
    assert int(cache.written) == 3


@pytest.mark.parametrize("kind", POLICIES)
def test_axes_have_the_form_of_the_caches(kind):
    model = toy(cache=POLICIES[kind]())
    caches, axes = jax.eval_shape(lambda: model.init_cache(2, 9)), model.cache_axes()
    for leaf, names in zip(
        jax.tree.leaves(caches), jax.tree.leaves(axes, is_leaf=lambda x: type(x) is tuple), strict=True
    ):
        assert len(leaf.shape) == 1 + len(names)


@pytest.mark.parametrize("kind", POLICIES)
def test_what_is_read_is_what_is_held(kind):
    policy = POLICIES[kind]()
    for tokens in (10, 4000):
        cache = jax.eval_shape(lambda: policy.init(1, tokens, 1, 8, jnp.float32))  # noqa: B023
        assert policy.room(tokens) == cache.slots >= policy.attended(tokens)


def test_a_config_names_a_policy():
    section = dict(block=BLOCK, vocab=17, dim=16, depth=2, cache=dict(kind="window", budget=9, sinks=1))
    assert build(LM, section, "model").cache == Window(budget=9, sinks=1)
    assert toy().cache is None
    assert Policy() == POLICIES["all"]()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Window(budget=4), "budget=4 slots hold no window beside sinks=4"),
        (lambda: Window(budget=4, sinks=-1), "sinks=-1"),
        (lambda: HeavyHitters(budget=0), "budget=0 must be at least 1"),
        (lambda: HeavyHitters(budget=4, recent=5), "recent=5 must be between 1 and budget=4"),
        (
            lambda: toy(block=dict(mixer=dict(kind="mamba"), ffn=None), cache=Window(9)).init_cache(1, 9),
            "cache=Window chooses among keys and values, and Mamba keeps none",
        ),
    ],
)
def test_bad_input(make, said):
    with pytest.raises(UsageError, match=said):
        make()
