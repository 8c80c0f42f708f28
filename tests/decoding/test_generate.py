import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.decoding.beam import Beams, beam_search
from effjax.decoding.generate import begin, decode, generate, left_pad
from effjax.decoding.prefill import prefill
from effjax.decoding.sampling import Sampling
from effjax.errors import UsageError
from effjax.ffn import Gated
from effjax.mixers import Attention, Mamba, Mamba2
from effjax.models.lm import LM, DecoderBlock

VOCAB = 19
GREEDY = Sampling(temperature=0.0)
PROMPTS = [[3, 1, 4, 1, 5], [9, 2]]


@pytest.fixture(scope="module")
def model():
    mixer = Attention(2, kv_heads=1, rotary_base=100.0, causal=True)
    return LM(DecoderBlock(mixer, Gated(24)), vocab=VOCAB, dim=16, depth=2, max_length=16)


@pytest.fixture(scope="module")
def variables(model):
    return drawn(model)


def drawn(model):
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    draw = np.random.default_rng(3)
    return jax.tree.map(lambda leaf: jnp.float32(draw.normal(size=leaf.shape) * 0.5), shapes)


def write(model, variables, prompts, max_new=6, seed=0, sampling=GREEDY, stop_token=None, slots=None):
    key = jax.random.key(seed)
    rows, lengths = left_pad(prompts)
    return np.asarray(generate(model, variables, rows, lengths, max_new, key, sampling, stop_token, slots))


def slowly(model, variables, prompt, max_new):
    """Greedy decoding by running the whole text again for every token."""
    text, run = list(prompt), jax.jit(model.apply)
    for _ in range(max_new):
        padded = jnp.array([text + [0] * (16 - len(text))])
        text.append(int(jnp.argmax(run(variables, padded)[0, len(text) - 1])))
    return text[len(prompt) :]


def test_greedy_equals_running_the_whole_text_again(model, variables):
    texts = write(model, variables, PROMPTS)
    assert len({*map(tuple, texts)}) == 2
    for prompt, text in zip(PROMPTS, texts, strict=True):
        assert text.tolist() == slowly(model, variables, prompt, 6)
    np.testing.assert_array_equal(write(model, variables, PROMPTS, seed=1), texts)


@pytest.mark.parametrize("prompts", [PROMPTS, [[3]]])
def test_layers_that_stand_apart_write_the_same(model, variables, prompts):
    apart = model.layers_apart(variables)
    np.testing.assert_array_equal(write(model, apart, prompts), write(model, variables, prompts))
    rows, lengths = left_pad(prompts)
    texts, scores = beam_search(model, apart, rows, lengths, 5, Beams(3), 7)
    expected, found = beam_search(model, variables, rows, lengths, 5, Beams(3), 7)
    np.testing.assert_array_equal(texts, expected)
    np.testing.assert_allclose(scores, found, rtol=1e-6)


def test_draws_repeat_with_the_seed_and_differ_between_seeds_and_rows(model, variables):
    hot = Sampling(temperature=3.0)
    texts = write(model, variables, [PROMPTS[0]] * 2, sampling=hot)
    np.testing.assert_array_equal(write(model, variables, [PROMPTS[0]] * 2, sampling=hot), texts)
    assert not np.array_equal(write(model, variables, [PROMPTS[0]] * 2, seed=1, sampling=hot), texts)
    assert not np.array_equal(texts[0], texts[1])


def test_draws_are_those_of_earlier_versions(model, variables):
    sampling = Sampling(temperature=0.9, top_k=9, top_p=0.95)
    texts = write(model, variables, PROMPTS, max_new=8, seed=7, sampling=sampling)
    assert texts.tolist() == [[17, 8, 17, 7, 13, 1, 9, 3], [9, 17, 13, 6, 13, 6, 14, 2]]


def test_a_text_may_be_written_in_pieces(model, variables):
    hot = Sampling(temperature=2.0)
    prompts, lengths = left_pad(PROMPTS)
    writing = begin(prefill(model, variables, prompts, lengths, 16), 6, jax.random.key(0))
    for until in (1, 2, 6):
        writing = decode(model, variables, writing, until, hot)
        assert int(writing.written) == until
    np.testing.assert_array_equal(writing.text, write(model, variables, PROMPTS, sampling=hot))


MIXERS = {
    "attention": Attention(2, kv_heads=1, rotary_base=100.0, causal=True),
    "window": Attention(2, window=3, causal=True),
    "mamba": Mamba(state=4),
    "mamba2": Mamba2(state=4, head=8, chunk=8),
}


@pytest.mark.parametrize("kind", MIXERS)
def test_a_text_does_not_depend_on_its_neighbours(kind):
    model = LM(DecoderBlock(MIXERS[kind], Gated(24)), vocab=VOCAB, dim=16, depth=2)
    variables = drawn(model)
    hot = Sampling(temperature=1.5)
    texts = {
        tuple(write(model, variables, [PROMPTS[1], *others], sampling=hot)[0].tolist())
        for others in ((), ([1] * 7,))
    }
    assert len(texts) == 1


@pytest.mark.parametrize("kind", MIXERS)
def test_padding_does_not_enter_what_is_kept(kind):
    model = LM(DecoderBlock(MIXERS[kind], Gated(24)), vocab=VOCAB, dim=16, depth=2)
    variables = drawn(model)
    prompts, lengths = left_pad([PROMPTS[1], [1] * 7])

    def next_logits(prompts, lengths):
        at = prefill(model, variables, prompts, lengths, 8)
        logits, _ = model.apply(
            variables, at.tokens[:, None], at.caches, at.positions[:, None], method="step"
        )
        return logits

    logits = jax.jit(next_logits)(prompts, lengths)[0]
    alone = jax.jit(next_logits)(*left_pad(PROMPTS[1:]))[0]
    np.testing.assert_allclose(logits, alone, rtol=1e-5, atol=1e-5)
    # What stands under the padding is never looked at.
    noise = jnp.where(jnp.arange(7)[None] < 7 - lengths[:, None], 13, prompts)
    np.testing.assert_array_equal(jax.jit(next_logits)(noise, lengths)[0], logits)


def test_a_text_ends_at_the_stop_token(model, variables):
    free = write(model, variables, PROMPTS)
    stop = next(int(token) for token in free[0] if token not in free[1])
    first = free[0].tolist().index(stop)
    ended = write(model, variables, PROMPTS, stop_token=stop)
    np.testing.assert_array_equal(ended[0], [*free[0][:first], *[stop] * (6 - first)])
    np.testing.assert_array_equal(ended[1], free[1])


@pytest.mark.slow
def test_one_token_prompts_and_low_precision(model, variables):
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables)
    texts = write(model, low, [[5], [7]], sampling=Sampling(top_k=1))
    assert texts.shape == (2, 6)
    assert texts.dtype == np.int32
    np.testing.assert_array_equal(texts, write(model, low, [[5], [7]]))  # top-1 is greedy


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "the prompt is empty"),
        (PROMPTS, {"max_new": 0}, "max_new is 0"),
        (PROMPTS, {"max_new": 13}, "cache for 17 tokens is longer than the 16 .*max_length.*has 5 tokens"),
        (
            [[1] * 9],
            {"slots": 8},
            "a prompt of 9 tokens and 6 new ones do not fit a cache of 8 slots: give it 14",
        ),
        ([[1, VOCAB]], {}, "token 19 is unknown: the model has the tokens 0 to 18"),
        ([[-1, 1]], {}, "token -1 is unknown"),
    ],
)
def test_bad_requests_are_named_before_anything_is_compiled(model, variables, prompts, options, message):
    compiled = prefill._cache_size(), decode._cache_size()
    with pytest.raises(UsageError, match=message):
        write(model, variables, prompts, **options)
    assert compiled == (prefill._cache_size(), decode._cache_size())


def test_one_compiled_prefill_serves_texts_of_many_lengths(model, variables):
    write(model, variables, PROMPTS, max_new=2, slots=12)
    before = prefill._cache_size()
    longer = write(model, variables, PROMPTS, max_new=8, slots=12)
    assert prefill._cache_size() == before
    np.testing.assert_array_equal(longer[:, :6], write(model, variables, PROMPTS))
