"""Beam search against a search through all texts, written as loops."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.decoding.beam import Beams, beam_search
from effjax.decoding.generate import generate, left_pad
from effjax.decoding.sampling import Sampling
from effjax.errors import UsageError
from effjax.mixers import Mamba
from effjax.models.lm import LM, DecoderBlock

VOCAB, STOP, MAX_NEW = 4, 3, 4
PROMPTS = [[1, 2, 0], [2], [0, 1]]


@pytest.fixture(scope="module")
def model():
    return LM(DecoderBlock(Mamba(state=2, width=2), None), vocab=VOCAB, dim=8, depth=2)


@pytest.fixture(scope="module")
def variables(model):
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    draw = np.random.default_rng(5)
    return jax.tree.map(lambda leaf: jnp.float32(draw.normal(size=leaf.shape) * 0.8), shapes)


@pytest.fixture(scope="module")
def log_p(model, variables):
    """`(prompt, text) -> log p(text | prompt)`, of all texts of every length, by the whole text at once."""
    texts = list(itertools.product(range(VOCAB), repeat=MAX_NEW))
    rows = np.array([[*prompt, *text] for prompt in ([1, 2, 0],) for text in texts])
    run = jax.jit(lambda rows: jax.nn.log_softmax(model.apply(variables, rows)))
    table = {}
    for prompt in PROMPTS:
        rows = np.array([[*prompt, *text] for text in texts])
        steps = np.asarray(run(rows), np.float64)[:, len(prompt) - 1 : -1]
        for text, step in zip(texts, steps, strict=True):
            total = 0.0
            for t, token in enumerate(text):
                total += step[t, token]
                table[(*prompt, -1, *text[: t + 1])] = total
    return lambda prompt, text: table[(*prompt, -1, *text)]


def complete(text):
    return STOP not in text[:-1] and (text[-1] == STOP or len(text) == MAX_NEW)


def all_texts():
    for size in range(1, MAX_NEW + 1):
        yield from filter(complete, itertools.product(range(VOCAB), repeat=size))


def score(log_p, prompt, text, penalty):
    return log_p(prompt, text) / len(text) ** penalty


def best_texts(log_p, prompt, penalty):
    return sorted(all_texts(), key=lambda text: -score(log_p, prompt, text, penalty))


def plainly(log_p, prompt, count, penalty):
    """The same search with lists."""
    live, finished = [()], []
    for _ in range(MAX_NEW):
        ways = [(*text, token) for text in live for token in range(VOCAB)]
        ways = sorted(ways, key=lambda text: -log_p(prompt, text))[: 2 * count]
        finished += [text for text in ways if complete(text)]
        live = [text for text in ways if not complete(text)][:count]
    return sorted(finished, key=lambda text: -score(log_p, prompt, text, penalty))[:count]


def search(model, variables, count, penalty, stop=STOP):
    texts, scores = beam_search(
        model, variables, *left_pad(PROMPTS), MAX_NEW, Beams(count, penalty), stop_token=stop
    )
    return np.asarray(texts), np.asarray(scores)


def filled(text):
    return [*text, *[STOP] * (MAX_NEW - len(text))]


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_with_a_beam_for_every_text_the_result_is_the_best_of_all(model, variables, log_p, penalty):
    count = 3**3  # unfinished texts before the last token
    texts, scores = search(model, variables, count, penalty)
    for row, prompt in enumerate(PROMPTS):
        wanted = best_texts(log_p, prompt, penalty)[:count]
        assert texts[row].tolist() == [filled(text) for text in wanted]
        assert len({len(text) for text in wanted}) > 1  # some end early
        known = [score(log_p, prompt, text, penalty) for text in wanted]
        np.testing.assert_allclose(scores[row], known, rtol=1e-5)


@pytest.mark.parametrize(("count", "penalty"), [(1, 1.0), (2, 0.0), (3, 0.5), (3, 2.0)])
def test_a_narrow_search_equals_the_same_with_lists(model, variables, log_p, count, penalty):
    texts, scores = search(model, variables, count, penalty)
    for row, prompt in enumerate(PROMPTS):
        wanted = plainly(log_p, prompt, count, penalty)
        assert texts[row].tolist()[: len(wanted)] == [filled(text) for text in wanted]
        known = [score(log_p, prompt, text, penalty) for text in wanted]
        np.testing.assert_allclose(scores[row][: len(wanted)], known, rtol=1e-5)
        assert np.all(np.isneginf(scores[row][len(wanted) :]))


def test_one_beam_without_an_end_is_greedy(model, variables):
    texts, _ = search(model, variables, 1, 1.0, stop=None)
    greedy = generate(
        model, variables, *left_pad(PROMPTS), MAX_NEW, jax.random.key(0), Sampling(temperature=0.0)
    )
    np.testing.assert_array_equal(texts[:, 0], greedy)


def test_bad_requests_are_named(model, variables):
    with pytest.raises(UsageError, match="beams is 0"):
        Beams(0)
    with pytest.raises(UsageError, match=r"length_penalty is -1\.0"):
        Beams(2, -1.0)
    with pytest.raises(UsageError, match=r"token 4 is unknown: the model has the tokens 0 to 3"):
        beam_search(model, variables, *left_pad([[4]]), 2, Beams(2))
