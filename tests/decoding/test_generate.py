import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.decoding.generate import generate, left_pad
from effjax.decoding.sampling import Sampling
from effjax.errors import UsageError
from effjax.ffn import Gated
from effjax.mixers import Attention
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
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    draw = np.random.default_rng(3)
    return jax.tree.map(lambda leaf: jnp.float32(draw.normal(size=leaf.shape) * 0.5), shapes)


def write(model, variables, prompts, max_new=6, seed=0, sampling=GREEDY, stop_token=None):
    key = jax.random.key(seed)
    return np.asarray(generate(model, variables, *left_pad(prompts), max_new, key, sampling, stop_token))


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


def test_draws_repeat_with_the_seed_and_differ_between_seeds_and_rows(model, variables):
    hot = Sampling(temperature=3.0)
    texts = write(model, variables, [PROMPTS[0]] * 2, sampling=hot)
    np.testing.assert_array_equal(write(model, variables, [PROMPTS[0]] * 2, sampling=hot), texts)
    assert not np.array_equal(write(model, variables, [PROMPTS[0]] * 2, seed=1, sampling=hot), texts)
    assert not np.array_equal(texts[0], texts[1])


def test_a_text_does_not_depend_on_its_neighbours(model, variables):
    alone, with_longer, with_other = (
        write(model, variables, prompts, sampling=Sampling(temperature=0.8))[0]
        for prompts in (PROMPTS[1:], [PROMPTS[1], [1] * 7], [PROMPTS[1], [4, 4]])
    )
    np.testing.assert_array_equal(alone, with_longer)
    np.testing.assert_array_equal(alone, with_other)


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


def test_bad_requests_are_named(model, variables):
    with pytest.raises(UsageError, match="the prompt is empty"):
        write(model, variables, [[1], []])
    with pytest.raises(UsageError, match="max_new is 0"):
        write(model, variables, PROMPTS, max_new=0)
    with pytest.raises(UsageError, match="17 tokens is longer than the 16"):
        write(model, variables, PROMPTS, max_new=13)
