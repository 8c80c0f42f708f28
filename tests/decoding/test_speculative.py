import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from scipy import stats

from effjax.decoding import generate, speculative
from effjax.decoding.drafts import ModelDraft, PromptLookup
from effjax.decoding.layer_plan import keeping, planned
from effjax.decoding.prefill import left_pad, prefill
from effjax.decoding.sampling import Sampling, probabilities
from effjax.decoding.speculative import verify
from effjax.errors import UsageError
from effjax.ffn import Gated
from effjax.mixers import Attention, Mamba
from effjax.models.lm import LM, DecoderBlock

VOCAB = 19
GREEDY = Sampling(temperature=0.0)
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [7]]


def build(vocab=VOCAB, dim=16, depth=2, seed=3, scale=0.5, **options):
    block = DecoderBlock(Attention(2, kv_heads=1, rotary_base=100.0, causal=True), Gated(24))
    model = LM(block, vocab=vocab, dim=dim, depth=depth, **options)
    return model, drawn(model, seed, scale)


def drawn(model, seed, scale):
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.float32(draw.normal(size=leaf.shape) * scale), shapes)


@pytest.fixture(scope="module")
def target():
    return build(max_length=17, seed=11, scale=0.8)


@pytest.fixture(scope="module")
def small():
    model, variables = build(dim=8, depth=1, seed=4)  # right by chance alone
    return ModelDraft(model, 3), variables


def write(target, drafting, prompts=PROMPTS, max_new=9, seed=0, sampling=GREEDY, stop_token=None):
    rows, lengths = left_pad(prompts)
    text, tally = speculative.generate(
        *target, *drafting, rows, lengths, max_new, jax.random.key(seed), sampling, stop_token
    )
    return np.asarray(text), tally


def plainly(target, prompts=PROMPTS, max_new=9, stop_token=None):
    rows, lengths = left_pad(prompts)
    key = jax.random.key(0)
    return np.asarray(generate.generate(*target, rows, lengths, max_new, key, GREEDY, stop_token))


def assert_distributed(found, expected):
    """A chi-square test of counts; cells too rare for it are one cell."""
    rare = expected * found.sum() < 5
    assert found[expected == 0].sum() == 0
    counts = np.append(found[~rare], found[rare].sum())
    awaited = np.append(expected[~rare], expected[rare].sum()) * found.sum()
    counts, awaited = counts[awaited > 0], awaited[awaited > 0]
    statistic = np.sum((counts - awaited) ** 2 / awaited)
    assert statistic < stats.chi2.ppf(1 - 1e-4, len(counts) - 1)


@pytest.mark.parametrize("tokens", [1, 3])
def test_verify_gives_the_distribution_of_the_model(draw, tokens):
    p = draw.dirichlet(np.full(5, 0.4), tokens + 1).astype(np.float32)
    q = draw.dirichlet(np.full(5, 0.4), tokens).astype(np.float32)

    def once(key):
        drafted, tested = jax.random.split(key)
        proposed = jax.random.categorical(drafted, jnp.log(q))
        return verify(jnp.asarray(p), jnp.asarray(q), proposed, tested)

    found, accepted = jax.jit(jax.vmap(once))(jax.random.split(jax.random.key(1), 20_000))
    assert_distributed(np.bincount(found[:, 0], minlength=5), p[0])
    # What follows an accepted token does not depend on it here.
    for place in range(1, tokens + 1):
        reached = np.asarray(found[:, place])[np.asarray(accepted) >= place]
        assert_distributed(np.bincount(reached, minlength=5), p[place])
    # Leviathan et al.: the rate is the mass that both have, theorem 3.5.
    rates = np.minimum(p[:-1], q).sum(axis=1)
    np.testing.assert_allclose(np.mean(accepted >= 1), rates[0], atol=0.02)
    np.testing.assert_allclose(np.mean(accepted == tokens), np.prod(rates), atol=0.02)


def test_verify_in_its_limits():
    p = jnp.array([[0.5, 0.5, 0.0], [0.0, 0.3, 0.7], [0.0, 0.0, 1.0]])
    keys = jax.random.split(jax.random.key(0), 200)

    def run(q, proposed):
        return jax.vmap(lambda key: verify(p, q, jnp.array(proposed), key))(keys)

    tokens, accepted = run(p[:2], [1, 2])
    assert set(accepted.tolist()) == {2}  # the same distributions
    np.testing.assert_array_equal(tokens, jnp.broadcast_to(jnp.array([1, 2, 2]), (200, 3)))
    tokens, accepted = run(jnp.eye(3)[jnp.array([2, 0])], [2, 0])
    assert set(accepted.tolist()) == {0}  # what the model never says
    assert set(tokens[:, 0].tolist()) == {0, 1}
    # Of q below p nothing is refused, and what is refused of q above p is made up for elsewhere.
    tokens, accepted = run(jnp.array([[0.4, 0.6, 0.0], [0.0, 0.6, 0.4]]), [0, 1])
    assert set(accepted.tolist()) == {1, 2}
    np.testing.assert_array_equal(tokens[:, 0], jnp.zeros(200))
    assert set(tokens[:, 1][accepted == 1].tolist()) == {2}


TINY = 4
SAMPLINGS = {
    "plain": Sampling(),
    "hot": Sampling(temperature=2.5),
    "cold_top_k": Sampling(temperature=0.6, top_k=3),
    "top_p": Sampling(top_p=0.8),
    "min_p": Sampling(temperature=1.5, min_p=0.25),
}


@functools.cache
def tiny():
    return build(vocab=TINY, dim=8, depth=2, seed=5, scale=0.7)


def joint(target, prompt, sampling, count):
    """The probabilities of all texts of so many tokens, by running each whole text."""
    model, variables = target
    texts = np.array([[*prompt, *text] for text in itertools.product(range(TINY), repeat=count)])
    p = probabilities(jax.jit(model.apply)(variables, jnp.asarray(texts)), sampling)
    p = np.asarray(p, np.float64)[:, len(prompt) - 1 : -1]
    return np.take_along_axis(p, texts[:, len(prompt) :, None], axis=2)[..., 0].prod(axis=1)


def drafts_of(target, kind):
    if kind == "model":
        model, variables = build(vocab=TINY, dim=4, depth=1, seed=6, scale=2.0)
        return ModelDraft(model, 2), variables
    if kind == "layers":
        few, cut = planned(*target, keeping(target[0].depth, [1]))
        return ModelDraft(few, 1), cut
    return PromptLookup(2, 2), None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "sampling"),
    [*itertools.product(["model"], SAMPLINGS), ("layers", "plain"), ("lookup", "plain"), ("lookup", "top_p")],
)
def test_texts_follow_the_distribution_of_the_model(kind, sampling):
    prompt, count = [2, 0, 3], 3
    target, how = tiny(), SAMPLINGS[sampling]
    text, tally = write(target, drafts_of(target, kind), [prompt] * 20_000, count, sampling=how)
    expected = joint(target, prompt, how, count)
    assert expected.sum() == pytest.approx(1.0, abs=1e-4)
    found = np.bincount(text @ TINY ** np.arange(count)[::-1], minlength=TINY**count)
    assert_distributed(found, expected)
    assert 0.1 < float(tally.acceptance) < 0.95  # a draft that differs
    assert len(set(tally.calls.tolist())) > 1


@pytest.mark.parametrize(("kind", "tokens"), [("model", 1), ("layers", 3), ("lookup", 3)])
def test_greedy_texts_are_those_without_a_draft(target, small, kind, tokens):
    few, cut = planned(*target, keeping(target[0].depth, [0]))
    drafting = {
        "model": (ModelDraft(small[0].model, tokens), small[1]),
        "layers": (ModelDraft(few, tokens), cut),
        "lookup": (PromptLookup(2, tokens), None),
    }[kind]
    text, tally = write(target, drafting)
    np.testing.assert_array_equal(text, plainly(target))
    np.testing.assert_array_equal(tally.written, [9, 9, 9])
    # A call adds a token of the model's own, but for a last one that has no room for it.
    assert set((tally.calls + tally.accepted - tally.written).tolist()) <= {0, 1}
    assert np.any(tally.accepted > 0)
    assert np.any(tally.accepted < tally.tested)


def test_texts_may_be_as_long_as_the_model_is_made_for(small):
    block = DecoderBlock(Attention(2, causal=True), Gated(24))
    model = LM(block, vocab=VOCAB, dim=16, depth=2, max_length=13, position_table=13)
    target = model, drawn(model, 11, 0.8)
    text, _ = write(target, small)  # 5 + 9 - 1
    np.testing.assert_array_equal(text, plainly(target))


def test_layers_that_stand_apart_write_the_same(target, small):
    model, variables = target
    drafting = small[0], small[0].model.layers_apart(small[1])
    text, _ = write((model, model.layers_apart(variables)), drafting)
    np.testing.assert_array_equal(text, plainly(target))


def test_texts_end_at_the_stop_token(target):
    free = plainly(target)
    itself = ModelDraft(target[0], 4), target[1]
    # Among the first proposals while others go on; then in all texts, at different calls.
    for stop, ends in ((3, [3, 9, 9]), (2, [6, 1, 8])):
        assert [row.tolist().index(stop) + 1 if stop in row else 9 for row in free] == ends
        text, tally = write(target, itself, stop_token=stop)
        np.testing.assert_array_equal(text, plainly(target, stop_token=stop))
        np.testing.assert_array_equal(tally.written, ends)
        np.testing.assert_array_equal(tally.calls, -(-np.array(ends) // 5))
        assert float(tally.acceptance) == 1.0


HOT = Sampling(temperature=1.5, top_k=7)


@pytest.mark.parametrize("how", [GREEDY, HOT])
def test_a_draft_that_is_the_model_is_always_right(target, how):
    for drafting in (target, planned(*target, keeping(target[0].depth, range(2)))):
        _, tally = write(target, (ModelDraft(drafting[0], 3), drafting[1]), max_new=8, sampling=how)
        np.testing.assert_array_equal(tally.calls, [2, 2, 2])  # 3 + 1 at a time
        np.testing.assert_array_equal(tally.accepted, tally.tested)
        assert float(tally.acceptance) == 1.0
        assert float(tally.tokens_per_call) == 4.0


def test_what_a_draft_that_is_the_model_says_of_its_tokens_is_what_the_model_says(target):
    """Also behind proposals that were accepted whole, whose last token its caches lack."""
    model, variables = target
    draft = ModelDraft(model, 2)
    propose, run = jax.jit(draft.propose, static_argnums=5), jax.jit(model.apply)
    rows, lengths = left_pad(PROMPTS)
    state = draft.start(variables, jnp.asarray(rows), jnp.asarray(lengths), 20)
    last, positions = jnp.asarray(rows[:, -1]), jnp.asarray(lengths) - 1
    keys = jax.random.split(jax.random.key(2), 3)
    texts = [list(prompt) for prompt in PROMPTS]
    for accepted in ([2, 0, 1], [1, 2, 2], [0, 2, 0]):
        at = positions[:, None] + jnp.arange(2)[None]
        tokens, q, state = propose(variables, state, last, at, keys, HOT)
        for row, text in enumerate(texts):
            whole = [*text, *tokens[row].tolist()]
            logits = run(variables, jnp.array([whole + [0] * (16 - len(whole))]))[0]
            p = probabilities(logits, HOT)[len(text) - 1 : len(whole) - 1]
            np.testing.assert_allclose(q[row], p, rtol=1e-4, atol=1e-5)
        count = jnp.array(accepted)
        new = jnp.where(jnp.arange(3)[None] < count[:, None], jnp.pad(tokens, ((0, 0), (0, 1))), 11)
        state = draft.accept(state, new, count, positions + 1)
        last, positions = jnp.full(3, 11), positions + count + 1
        for row, text in enumerate(texts):
            text += new[row, : accepted[row] + 1].tolist()


def test_rows_accept_for_themselves(target, small):
    """A text is the same whatever stands beside it, and takes its own number of calls."""
    options = dict(sampling=Sampling(temperature=0.5), max_new=12)
    text, tally = write(target, small, [PROMPTS[0]] * 4, **options)
    again, fewer = write(target, small, [PROMPTS[0], PROMPTS[1]], **options)
    assert len(set(tally.calls.tolist())) > 1
    np.testing.assert_array_equal(again[0], text[0])
    assert int(fewer.calls[0]) == int(tally.calls[0])
    other, _ = write(target, small, [PROMPTS[0]] * 4, seed=1, **options)
    assert not np.array_equal(other, text)


def test_a_text_may_be_written_in_pieces(target, small):
    rows, lengths = left_pad(PROMPTS)
    writing = speculative.begin(*target, *small, rows, lengths, 9, jax.random.key(0))
    for until in (1, 4, 9):
        writing = speculative.decode(*target, *small, writing, until, HOT)
        assert np.all(writing.tally.written >= until)
    np.testing.assert_array_equal(writing.text, write(target, small, sampling=HOT)[0])


def test_looking_up_finds_what_followed():
    draft = PromptLookup(words=2, tokens=3)

    def proposed(*texts):
        rows, lengths = left_pad([list(text) for text in texts])
        lengths = jnp.asarray(lengths)
        state = draft.start(None, jnp.asarray(rows), lengths, 16)
        at = lengths[:, None] - 1 + jnp.arange(3)[None]
        keys = jax.random.split(jax.random.key(0), len(texts))
        tokens, q, _ = draft.propose(None, state, jnp.asarray(rows[:, -1]), at, keys, GREEDY)
        assert q is None
        return tokens.tolist()

    # The longest match before the latest, the latest of equals, and round again at the end of the text.
    found = proposed([5, 6, 7, 8, 9, 6, 1, 5, 6], [1, 2, 9, 1, 3, 1], [4, 4])
    assert found == [[7, 8, 9], [3, 1, 3], [4, 4, 4]]
    assert len(proposed([3], [1, 2, 3])) == 2  # nothing to find


def test_looking_up_goes_on_from_what_was_written():
    """A model that counts in a circle: each proposal from the second time round is right."""
    block = DecoderBlock(Attention(2, causal=True), Gated(8))
    model = LM(block, vocab=5, dim=8, depth=1)
    params = jax.tree.map(jnp.zeros_like, drawn(model, 0, 1.0))["params"]
    params["norm"]["scale"] = jnp.ones(8)
    params["embedding"] = jnp.eye(5, 8)
    params["head"] = jnp.roll(jnp.eye(5, 8), 1, axis=0)
    text, tally = write((model, {"params": params}), (PromptLookup(2, 4), None), [[0], [3, 4]], 20)
    np.testing.assert_array_equal(text, [[*range(1, 5), 0] * 4, [*range(5)] * 4])
    assert np.all(tally.calls <= 10)
    assert float(tally.tokens_per_call) >= 2.0


@pytest.mark.slow
def test_low_precision(target, small):
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (target[1], small[1]))
    text, _ = write((target[0], low[0]), (small[0], low[1]), sampling=Sampling(top_k=1))
    assert text.shape == (3, 9)
    assert text.dtype == np.int32


def refused(model, draft, prompts=PROMPTS, max_new=4):
    compiled = prefill._cache_size(), speculative.decode._cache_size()
    rows, lengths = left_pad(prompts)
    with pytest.raises(UsageError) as error:
        speculative.generate(model, {}, draft, {}, rows, lengths, max_new, jax.random.key(0), GREEDY)
    assert compiled == (prefill._cache_size(), speculative.decode._cache_size())
    return str(error.value)


def test_bad_requests_are_named_before_anything_is_compiled(target):
    model = target[0]
    recurrent = LM(DecoderBlock(Mamba(state=4), None), vocab=VOCAB, dim=8, depth=2)
    assert "19 tokens" not in refused(model, ModelDraft(recurrent))
    assert "tokens cannot be taken back" in refused(model, ModelDraft(recurrent))
    assert "tokens cannot be taken back" in refused(recurrent, ModelDraft(model))
    assert "the draft has 20 tokens and the model 19" in refused(model, ModelDraft(model.clone(vocab=20)))
    assert "longer than the 6" in refused(model, ModelDraft(model.clone(max_length=6)))
    assert "longer than the 17" in refused(model, PromptLookup(), max_new=14)
    assert "max_new is 0" in refused(model, PromptLookup(), max_new=0)
    with pytest.raises(UsageError, match="the draft proposes 0 tokens at a time"):
        ModelDraft(model, 0)
    with pytest.raises(UsageError, match="the draft proposes -1 tokens at a time"):
        PromptLookup(3, -1)
    with pytest.raises(UsageError, match="words is 0"):
        PromptLookup(0)
