"""Rounds of a model that does as a table says, and of random weights against ordinary generation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.decoding.cache import visible
from effjax.decoding.generate import generate, left_pad
from effjax.decoding.inftythink import InftyThink, Reasoning, Round, parts, reason, write_round
from effjax.decoding.sampling import Sampling
from effjax.errors import UsageError
from effjax.ffn import Gated
from effjax.layers.stack import layer_of
from effjax.measure.analytic.inftythink import attended
from effjax.mixers import Attention
from effjax.models.lm import LM, DecoderBlock

GREEDY = Sampling(temperature=0.0)
STOP, HISTORY, SUMMARY = 0, 1, 2


def chain(following, vocab=16, **fields):
    """A model that answers each token with the one `following` names: its blocks add nothing."""
    block = DecoderBlock(Attention(2, causal=True), Gated(8))
    model = LM(block, vocab=vocab, dim=vocab, depth=2, **fields)
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)["params"]
    params["norm"]["scale"] = jnp.ones(vocab)
    params["embedding"] = jnp.eye(vocab)
    for now, then in following.items():
        params["head"] = params["head"].at[then, now].set(1.0)
    return model, {"params": params}


def think(following, questions, vocab=16, **fields):
    rule = InftyThink(**dict(eta=5, summary=2) | fields)
    model, variables = chain(following, vocab)
    return reason(model, variables, questions, rule, jax.random.key(0), GREEDY)


def test_the_model_ends_its_rounds_itself_and_the_next_knows_the_summary():
    # 5 6 7 | 8 -> the summary leads on to 9, from which it stops.
    done = think({5: 6, 6: 7, 7: SUMMARY, SUMMARY: 8, 8: STOP}, [[4, 5]], rounds=3)[0]
    assert done.rounds[0] == Round((4, 5), (6, 7), (8,))
    assert done.rounds[1] == Round((4, 5, HISTORY, 8), (), None)
    assert done.finished
    assert done.answer == ()
    answered = think({5: SUMMARY, SUMMARY: 8, 8: 9, 9: STOP}, [[4, 5]])[0]
    # What is said behind `9` is the same in a summary as in a segment: the table knows no places.
    assert answered.rounds == (Round((4, 5), (), (8, 9)), Round((4, 5, HISTORY, 8, 9), (), None))


def test_segments_and_summaries_are_held_to_their_length():
    # It would count on for ever: 4 5 6 7 8 9 10 4 5 ...
    circle = {**{i: i + 1 for i in range(4, 10)}, 10: 4, SUMMARY: 9}
    done = think(circle, [[4]], rounds=3)[0]
    assert done.rounds[0] == Round((4,), (5, 6, 7, 8, 9), (9, 10))
    assert done.rounds[1] == Round((4, HISTORY, 9, 10), (4, 5, 6, 7, 8), (9, 10))
    assert len(done.rounds) == 3
    assert not done.finished
    assert done.answer is None


def test_rows_that_are_done_wait_for_the_others():
    following = {4: STOP, 5: 6, 6: SUMMARY, SUMMARY: 7, 7: STOP}
    together = think(following, [[4], [3, 5], [4]])
    assert [len(done.rounds) for done in together] == [1, 2, 1]
    assert together[1:2] == think(following, [[3, 5]])
    assert together[0] == Reasoning((Round((4,), (), None),))


@pytest.fixture(scope="module")
def model():
    mixer = Attention(2, kv_heads=1, rotary_base=100.0, causal=True)
    return LM(DecoderBlock(mixer, Gated(24)), vocab=19, dim=16, depth=2)


@pytest.fixture(scope="module")
def variables(model):
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    draw = np.random.default_rng(3)
    return jax.tree.map(lambda leaf: jnp.float32(draw.normal(size=leaf.shape) * 0.5), shapes)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=2.0)])
def test_one_round_of_any_length_is_ordinary_generation(model, variables, sampling):
    questions, key, most = [[3, 4, 8, 4, 5], [9, 7]], jax.random.key(5), 12
    rule = InftyThink(most, most, rounds=1, history_token=18, summary_token=17, stop_token=16)
    done = reason(model, variables, questions, rule, key, sampling)
    texts = generate(model, variables, *left_pad(questions), most, key, sampling, stop_token=16)
    for thought, text in zip(done, np.asarray(texts).tolist(), strict=True):
        (only,) = thought.rounds
        said = [*only.segment, *((17, *only.summary) if only.summary is not None else ()), 16]
        assert said[:most] == text[: len(said)]


def test_draws_of_later_rounds_are_new(model, variables):
    rule = InftyThink(4, 2, rounds=4, history_token=18, summary_token=17, stop_token=16)
    hot = Sampling(temperature=50.0)
    done = reason(model, variables, [[3, 4]], rule, jax.random.key(1), hot)[0]
    assert len({each.segment for each in done.rounds}) == len(done.rounds)
    again = reason(model, variables, [[3, 4]], rule, jax.random.key(1), hot)[0]
    assert again == done


@pytest.mark.parametrize("seed", range(4))
def test_no_cache_exceeds_the_bound_and_attention_costs_what_the_model_says(model, variables, seed, draw):
    """Pairs of query and key that the caches' own mask allows, counted in what the rounds leave behind."""
    rule = InftyThink(5, 3, rounds=3, history_token=18, summary_token=17, stop_token=16)
    question, key = draw.integers(0, 16, 4).tolist(), jax.random.key(seed)
    hot = Sampling(temperature=3.0)
    done = reason(model, variables, [question], rule, key, hot)[0]
    keys, sizes, pairs = jax.random.fold_in(key, 0)[None], [], 0
    width = rule.width(len(question))
    for number, each in enumerate(done.rounds):
        assert len(each.segment) <= rule.eta
        assert len(each.summary or ()) <= rule.summary
        row = np.zeros((1, width), np.int32)
        row[0, width - len(each.prompt) :] = each.prompt
        length = jnp.array([len(each.prompt)])
        first = jnp.int32(number * rule.new)
        text, left = write_round(model, variables, jnp.asarray(row), length, keys, first, rule, hot)
        assert parts(text[0].tolist(), rule) == (each.segment, each.summary)
        cache = layer_of(left.caches, 0)
        assert cache.keys.shape[1] == rule.peak(len(question))  # slots of the array itself
        sizes.append(int(jnp.sum(cache.positions >= 0)))
        seen = visible(cache.positions, cache.positions) & (cache.positions >= 0)[:, None, :, None]
        pairs += int(jnp.sum(seen))
    assert sizes == [each.read for each in done.rounds]
    assert max(sizes) <= rule.peak(len(question)) == 4 + (1 + 3) + 5 + (1 + 3)
    assert pairs == attended(sizes)


def test_all_rounds_are_compiled_once():
    before = write_round._cache_size()
    circle = {**{i: i + 1 for i in range(4, 10)}, 10: 4, SUMMARY: 9}
    done = think(circle, [[4, 4, 4], [5]], vocab=12, rounds=4)
    assert [len(each.rounds) for each in done] == [4, 4]
    assert write_round._cache_size() == before + 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(eta=0), "eta=0 must be at least 1"),
        (dict(summary=0), "summary=0"),
        (dict(rounds=0), "rounds=0"),
        (dict(stop_token=2), "must differ, not"),
    ],
)
def test_bad_rules_are_named(fields, message):
    with pytest.raises(UsageError, match=message):
        InftyThink(**dict(eta=5, summary=2) | fields)


def test_bad_questions_are_named():
    with pytest.raises(UsageError, match="a question is empty"):
        think({}, [[4], []])
    with pytest.raises(UsageError, match="token 16 is unknown"):
        think({}, [[16]])
    model, variables = chain({}, max_length=10)
    with pytest.raises(UsageError, match="longer than the 10 that the model is made for"):
        reason(model, variables, [[4]], InftyThink(5, 2), jax.random.key(0), GREEDY)
