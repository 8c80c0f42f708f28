"""GemFilter against loops over one sequence in float64, and where it must be the model itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.decoding.gemfilter import GemFilter, choose, compress, scores
from effjax.decoding.generate import generate, left_pad
from effjax.decoding.sampling import Sampling
from effjax.errors import UsageError
from effjax.ffn import Gated
from effjax.measure import count
from effjax.mixers import Attention, Mamba
from effjax.models.lm import LM, DecoderBlock, Layer

VOCAB, HEADS, GROUPS, SIZE, BASE = 19, 4, 2, 4, 100.0


def model_of(depth=4, block=None, **fields):
    mixer = Attention(HEADS, kv_heads=GROUPS, rotary_base=BASE, qkv_bias=False, out_bias=False, causal=True)
    return LM(block or DecoderBlock(mixer, Gated(24)), vocab=VOCAB, dim=16, depth=depth, **fields)


def drawn(model):
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    draw = np.random.default_rng(3)
    return jax.tree.map(lambda leaf: jnp.float32(draw.normal(size=leaf.shape) * 0.5), shapes)


@pytest.fixture(scope="module")
def model():
    return model_of()


@pytest.fixture(scope="module")
def variables(model):
    return drawn(model)


def prompts_of(draw, *lengths):
    return [draw.integers(0, VOCAB, length).tolist() for length in lengths]


def brute_scores(variables, prompt, layer):
    """The same in float64, token by token and head by head, from a forward pass of all that is before."""
    tree = jax.tree.map(np.float64, variables["params"])
    blocks, n = tree["blocks"], len(prompt)
    x = tree["embedding"][np.array(prompt)]

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5) * scale

    def turned(x):
        angle = np.arange(n)[:, None] * BASE ** (-np.arange(SIZE // 2) * 2 / SIZE)
        cos, sin, (a, b) = np.cos(angle)[:, None], np.sin(angle)[:, None], np.split(x, 2, -1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    for i in range(layer + 1):
        mixer, ffn = (jax.tree.map(lambda leaf: leaf[i], blocks[name]) for name in ("mixer", "ffn"))  # noqa: B023
        h = norm(x, blocks["mixer_norm"]["scale"][i])
        q, k, v = (
            np.einsum("nc,chd->nhd", h, mixer[name]["kernel"].reshape(16, -1, SIZE))
            for name in ("query", "key", "value")
        )
        q, k = turned(q), turned(k)
        if i == layer:
            return np.array([sum(q[-1, h] @ k[j, h // 2] for h in range(HEADS)) for j in range(n)])
        y = np.zeros((n, HEADS, SIZE))
        for h in range(HEADS):
            logits = q[:, h] @ k[:, h // 2].T / np.sqrt(SIZE)
            weights = np.exp(np.where(np.tri(n) > 0, logits, -np.inf))
            y[:, h] = weights / weights.sum(-1, keepdims=True) @ v[:, h // 2]
        x = x + y.reshape(n, -1) @ mixer["output"]["kernel"].reshape(-1, 16)
        h = norm(x, blocks["ffn_norm"]["scale"][i])
        gate = h @ ffn["gate"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ ffn["expand"]["kernel"])) @ ffn["contract"]["kernel"]
    raise AssertionError


def brute_choice(found, keep, pool):
    around = np.pad(found, pool // 2)
    means = [np.mean(around[j : j + pool]) for j in range(len(found))]
    return sorted(sorted(range(len(found)), key=lambda j: -means[j])[:keep])


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_scores_and_choice_are_those_of_a_whole_forward_pass(model, variables, draw, layer):
    texts = prompts_of(draw, 14, 9)
    prompts, lengths = left_pad(texts)
    found = np.asarray(scores(model, variables, jnp.asarray(prompts), jnp.asarray(lengths), layer))
    gems = GemFilter(layer, keep=6, pool=3)
    tokens, left = compress(model, variables, prompts, lengths, gems)
    assert left.tolist() == [6, 6]
    for row, text in enumerate(texts):
        wanted = brute_scores(variables, text, layer)
        np.testing.assert_allclose(found[row, -len(text) :], wanted, rtol=1e-4, atol=1e-4)
        chosen = brute_choice(wanted, 6, 3)
        assert tokens[row].tolist() == [text[j] for j in chosen]


@pytest.mark.parametrize("pool", [1, 5])
def test_the_choice_is_sorted_pooled_and_takes_the_first_of_equals(draw, pool):
    found = draw.normal(size=(3, 40)).astype(np.float32)
    found[2] = 0.0
    places = choose(jnp.asarray(found), jnp.full(3, 40), GemFilter(0, 10, pool))
    for row in range(3):
        assert places[row].tolist() == brute_choice(np.float64(found[row]), 10, pool)
    alone = choose(jnp.asarray(found), jnp.full(3, 40), GemFilter(0, 10, pool, recent=4))
    assert alone[:, -4:].tolist() == [[36, 37, 38, 39]] * 3


def test_padding_is_never_chosen_and_short_prompts_stay_whole(model, variables, draw):
    texts = prompts_of(draw, 12, 4, 1)
    prompts, lengths = left_pad(texts)
    noise = np.where(np.arange(12)[None] < 12 - lengths[:, None], 13, prompts)
    gems = GemFilter(2, keep=6)
    tokens, left = compress(model, variables, noise, lengths, gems)
    assert left.tolist() == [6, 4, 1]
    assert tokens[1, -4:].tolist() == texts[1]
    assert tokens[2, -1:].tolist() == texts[2]
    alone, _ = compress(model, variables, *left_pad(texts[:1]), gems)
    np.testing.assert_array_equal(tokens[0], alone[0])


def write(model, variables, prompts, lengths):
    hot = Sampling(temperature=1.5)
    return np.asarray(generate(model, variables, prompts, lengths, 5, jax.random.key(0), hot))


def test_keeping_everything_is_the_model_itself(model, variables, draw):
    prompts, lengths = left_pad(prompts_of(draw, 9, 5))
    plain = write(model, variables, prompts, lengths)
    for keep in (9, 30):
        kept = compress(model, variables, prompts, lengths, GemFilter(2, keep))
        np.testing.assert_array_equal(write(model, variables, *kept), plain)
    # The shorter prompt loses nothing where the longer one does.
    texts = compress(model, variables, prompts, lengths, GemFilter(2, 5))
    np.testing.assert_array_equal(write(model, variables, *texts)[1], plain[1])
    assert not np.array_equal(write(model, variables, *texts)[0], plain[0])


def test_what_is_written_is_what_follows_the_chosen_tokens_alone(model, variables, draw):
    prompts, lengths = left_pad(prompts_of(draw, 14))
    tokens, left = compress(model, variables, prompts, lengths, GemFilter(1, 6))
    texts = write(model, variables, tokens, left)
    np.testing.assert_array_equal(texts, write(model, variables, *left_pad([tokens[0].tolist()])))


VARIANTS = {
    "after": dict(norm_at="after"),
    "parallel": dict(parallel="one_norm", norm="layer"),
    "normed": dict(mixer=Attention(4, kv_heads=2, rotary_base=BASE, qk_norm=True, window=5, causal=True)),
}


@pytest.mark.parametrize("kind", VARIANTS)
def test_relatives_of_the_model_choose_by_their_own_queries_and_keys(draw, kind):
    """Scores are linear in the keys that the model itself puts into its cache: 20 of them of 8 channels."""
    fields = dict(mixer=Attention(4, kv_heads=2, rotary_base=BASE, causal=True), ffn=Gated(24))
    block = DecoderBlock(**fields | VARIANTS[kind])
    model = model_of(2, block, norm_scaling=kind == "parallel")
    variables, layer = drawn(model), 1
    prompts = jnp.asarray(draw.integers(0, VOCAB, (1, 20)), jnp.int32)
    caches = model.init_cache(1, 20)
    _, caches = jax.jit(functools.partial(model.apply, method="step"))(variables, prompts, caches)
    found = scores(model, variables, prompts, jnp.array([20]), layer)
    keys = np.float64(caches.keys[layer, 0]).reshape(20, -1)
    solved, *_ = np.linalg.lstsq(keys, np.float64(found[0]), rcond=None)
    np.testing.assert_allclose(keys @ solved, found[0], rtol=1e-4, atol=1e-4)
    assert np.linalg.matrix_rank(keys) == 8


def test_layers_that_differ_share_or_stand_apart(draw):
    prompts, lengths = left_pad(prompts_of(draw, 9, 6))
    given = jnp.asarray(prompts), jnp.asarray(lengths)
    each = model_of(3, layers=(Layer(window=4, rotary_base=10.0), Layer()))
    variables = drawn(each)
    found = scores(each, variables, *given, 2)
    np.testing.assert_allclose(scores(each, each.layers_apart(variables), *given, 2), found, rtol=1e-5)
    shared = model_of(3, shared=(".*",))
    looped = drawn(shared)
    unrolled = {
        "params": {
            **looped["params"],
            "blocks": jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), looped["params"]["blocks"]),
        }
    }
    np.testing.assert_allclose(
        scores(shared, looped, *given, 2), scores(model_of(3), unrolled, *given, 2), rtol=1e-5
    )


def test_the_first_pass_runs_what_is_before_the_layer_and_keeps_no_cache():
    model, n = model_of(8), 64
    variables = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    shapes = jax.ShapeDtypeStruct((1, n), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    cost = count(lambda *given: scores(model, *given, 3), variables, *shapes)
    ffn = sum(sum(kinds.values()) for scope, kinds in cost.macs_by_scope.items() if "/ffn/" in scope)
    assert ffn == 3 * 3 * n * 16 * 24
    assert not [scope for scope in cost.macs_by_scope if scope.endswith("LM")]  # no logits
    # Three layers more are copied out of the stack, and nothing else adds up.
    deeper = count(lambda *given: scores(model, *given, 6), variables, *shapes)
    weights = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]["blocks"])) * 4
    assert deeper.peak_bytes - cost.peak_bytes == weights * 3 / 8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(layer=-1), "layer=-1"),
        (dict(keep=0), "keep=0 must be at least 1"),
        (dict(pool=4), "pool=4 must be odd"),
        (dict(recent=7), "recent=7 must be between 0 and keep=6"),
    ],
)
def test_bad_settings_are_named(fields, message):
    with pytest.raises(UsageError, match=message):
        GemFilter(**dict(layer=1, keep=6) | fields)


def test_models_without_such_a_layer_are_refused(model, variables):
    prompts, lengths = left_pad([[1] * 9])
    with pytest.raises(UsageError, match="layer=4 of 4: the last one is 3"):
        compress(model, variables, prompts, lengths, GemFilter(4, 5))
    recurrent = model_of(block=DecoderBlock(Mamba(state=4), None))
    with pytest.raises(UsageError, match="Mamba has no queries and keys"):
        compress(recurrent, {}, prompts, lengths, GemFilter(1, 5))
