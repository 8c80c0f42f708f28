"""Blocks that are skipped, executed or repeated for each sequence, whole and step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.decoding.beam import Beams, beam_search
from effjax.decoding.generate import generate, left_pad
from effjax.decoding.layer_plan import planned
from effjax.decoding.sampling import Sampling
from effjax.errors import UsageError
from effjax.ffn import Gated
from effjax.layers.stack import layer_of
from effjax.mixers import Attention, Mamba
from effjax.models.lm import LM, DecoderBlock
from effjax.models.routed_lm import UNDECIDED, alike, routed, with_routers

GREEDY = Sampling(temperature=0.0)
VOCAB, DEPTH = 19, 3
TOKENS = np.random.default_rng(5).integers(0, VOCAB, (4, 7)).astype(np.int32)
# One sequence skips all, one executes all.
COUNTS = np.array([[0, 0, 0], [1, 1, 1], [0, 2, 1], [1, 0, 2]], np.int32)


def of(mixer=None, **fields):
    mixer = Attention(2, kv_heads=1, rotary_base=100.0, causal=True) if mixer is None else mixer
    return LM(DecoderBlock(mixer, Gated(24)), vocab=VOCAB, dim=16, depth=DEPTH, **fields)


def drawn(model, scale=0.5):
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    draw = np.random.default_rng(3)
    return jax.tree.map(lambda leaf: jnp.float32(draw.normal(size=leaf.shape) * scale), shapes)


@pytest.fixture(scope="module")
def model():
    return of()


@pytest.fixture(scope="module")
def variables(model):
    return drawn(model)


@pytest.fixture(scope="module")
def all_variables(model):
    """With routers that say different things of different sequences."""
    return drawn(routed(model, windows=2, bottleneck=8))


def telling(model, variables, counts):
    """Routers that decide so for every sequence, whatever they read."""
    held = with_routers(routed(model), variables, jax.random.key(0))
    router = jax.tree.map(jnp.zeros_like, held["params"]["blocks"]["router"])
    router["contract"]["bias"] = jax.nn.one_hot(jnp.asarray(counts), 3)
    blocks = {**held["params"]["blocks"], "router": router}
    return {**held, "params": {**held["params"], "blocks": blocks}}


def along(model, variables, tokens=TOKENS, **options):
    options = jax.tree.map(jnp.asarray, options)
    return jax.jit(lambda v, t, o: model.apply(v, t, **o, method="along"))(variables, tokens, options)


def test_routers_that_execute_all_are_the_base_model(model, variables):
    told = telling(model, variables, [1] * DEPTH)
    found = jax.jit(routed(model).apply)(told, TOKENS)
    np.testing.assert_array_equal(found, jax.jit(model.apply)(variables, TOKENS))


@pytest.mark.parametrize("prompts", [[[3, 1, 4, 1], [9, 2]], [[7]]])
def test_routers_that_execute_all_write_what_the_base_model_does(model, variables, prompts):
    rows, lengths = left_pad(prompts)
    told = telling(model, variables, [1] * DEPTH)
    options = (rows, lengths, 4, jax.random.key(0), GREEDY)
    np.testing.assert_array_equal(
        generate(routed(model), told, *options), generate(model, variables, *options)
    )


def test_skipping_all_leaves_the_embedding_to_the_head(model, variables):
    told = telling(model, variables, [0] * DEPTH)
    params = variables["params"]
    x = params["embedding"][TOKENS]
    x = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + model.block.epsilon)
    expected = (x * params["norm"]["scale"][None, None]) @ params["head"].T
    np.testing.assert_allclose(jax.jit(routed(model).apply)(told, TOKENS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("group", [None, 2, 1])
def test_every_sequence_runs_its_own_plan(model, variables, group):
    held = with_routers(routed(model), variables, jax.random.key(0))
    found, route = along(routed(model, group=group), held, counts=COUNTS)
    np.testing.assert_array_equal(route.counts, COUNTS.T)
    for row, counts in enumerate(COUNTS):
        if counts.sum():
            shorter, kept = planned(model, variables, counts.tolist())
            expected = jax.jit(shorter.apply)(kept, TOKENS[row : row + 1])[0]
            np.testing.assert_allclose(found[row], expected, rtol=1e-4, atol=1e-4)


def test_decisions_are_those_of_the_prompt(model, all_variables):
    reads = np.array([3, 7, 2, 5], np.int32)
    router = routed(model, windows=2, bottleneck=8)
    logits, route = along(router, all_variables, reads=reads)
    assert len(np.unique(route.counts)) == 3
    np.testing.assert_array_equal(route.counts, np.argmax(route.logits, -1))
    # Others behind the prompt change nothing of what is decided; others in it do.
    late = np.where(np.arange(7)[None] < reads[:, None], TOKENS, (TOKENS + 1) % VOCAB)
    again = along(router, all_variables, late, reads=reads)[1]
    np.testing.assert_allclose(again.logits, route.logits, rtol=1e-4, atol=1e-4)
    given, _ = along(router, all_variables, counts=route.counts.T)
    np.testing.assert_allclose(given, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("group", "apart"), [(None, False), (None, True), (1, False), (2, True)], ids=str)
def test_step_by_step_is_the_whole_text(model, all_variables, group, apart):
    """Decided once, at the prompt without its last token, for sequences of unequal length."""
    router = routed(model, windows=2, bottleneck=8, group=group)
    prompts = [TOKENS[0, :6].tolist(), TOKENS[1, :3].tolist(), TOKENS[2, :4].tolist(), [5, 5]]
    rows, lengths = left_pad(prompts)
    held = router.layers_apart(all_variables) if apart else all_variables
    written = np.asarray(generate(router, held, rows, lengths, 3, jax.random.key(0), GREEDY))
    run = jax.jit(lambda t, reads: router.clone(block=router.block.clone(group=None)).apply(
        all_variables, t, reads=reads, method="along"))  # fmt: skip
    plans = set()
    for prompt, found in zip(prompts, written, strict=True):
        text, reads = list(prompt), jnp.array([len(prompt) - 1], jnp.int32)
        for _ in range(3):
            logits, route = run(jnp.array([text + [0] * (9 - len(text))]), reads)
            text.append(int(jnp.argmax(logits[0, len(text) - 1])))
        plans.add(tuple(route.counts[:, 0].tolist()))
        assert found.tolist() == text[len(prompt) :]
    assert len(plans) > 1
    assert {0, 1, 2} <= set(sum(plans, ()))


def test_each_run_has_slots_of_its_own(model, variables):
    """What a second run wrote is what the block makes of what the first run gave."""
    router, plan = routed(model), [0, 2, 1]
    told = telling(model, variables, plan)
    caches = router.init_cache(4, 8)
    assert set(np.unique(caches.counts)) == {UNDECIDED}
    _, caches = jax.jit(lambda v, c: router.apply(v, jnp.asarray(TOKENS), c, method="step"))(told, caches)
    np.testing.assert_array_equal(caches.counts, np.tile(np.array(plan)[:, None], (1, 4)))
    seen = np.asarray(caches.first.positions >= 0), np.asarray(caches.second.positions >= 0)
    for layer, count in enumerate(plan):
        assert seen[0][layer].sum() == 4 * 7 * (count > 0)
        assert seen[1][layer].sum() == 4 * 7 * (count > 1)
    shorter, kept = planned(model, variables, plan)
    _, deep = jax.jit(lambda v, c: shorter.apply(v, jnp.asarray(TOKENS), c, method="step"))(
        kept, shorter.init_cache(4, 8)
    )
    for mine, slot in (
        (layer_of(caches.first, 1), 0),
        (layer_of(caches.second, 1), 1),
        (layer_of(caches.first, 2), 2),
    ):
        expected = layer_of(deep, slot)
        np.testing.assert_allclose(mine.keys[:, :7], expected.keys[:, :7], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(mine.values[:, :7], expected.values[:, :7], rtol=1e-4, atol=1e-4)
    assert np.abs(layer_of(caches.first, 1).keys - layer_of(caches.second, 1).keys).max() > 0.1


def test_a_state_is_kept_where_a_layer_is_skipped():
    model = of(Mamba(state=4))
    variables = drawn(model)
    options = (*left_pad([[3, 1, 4, 1], [9, 2]]), 4, jax.random.key(0), GREEDY)
    for plan in ([1, 1, 1], [1, 0, 2]):
        shorter, kept = planned(model, variables, plan)
        np.testing.assert_array_equal(
            generate(routed(model), telling(model, variables, plan), *options),
            generate(shorter, kept, *options),
        )


def test_with_a_margin_only_what_is_sure_is_not_executed(model, all_variables):
    router = routed(model, windows=2, bottleneck=8)
    runs = []
    for margin in (0.0, 0.5, 1.0):
        clone = router.clone(block=router.block.clone(margin=margin))
        _, route = along(clone, all_variables)
        p = jax.nn.softmax(route.logits) + jnp.array([0.0, margin, 0.0])[None, None]
        np.testing.assert_array_equal(route.counts, np.argmax(p, axis=-1))
        runs.append(np.sum(np.asarray(route.counts) != 1))
    assert runs[0] > runs[1] > runs[2] == 0


def test_beams_carry_their_decisions(model, all_variables):
    router = routed(model, windows=2, bottleneck=8)
    rows, lengths = left_pad([[3, 1, 4, 1], [9, 2]])
    texts, _ = beam_search(router, all_variables, rows, lengths, 3, Beams(1))
    greedy = generate(router, all_variables, rows, lengths, 3, jax.random.key(0), GREEDY)
    np.testing.assert_array_equal(texts[:, 0], greedy)


def test_requests_of_like_decisions_stand_together():
    counts = jnp.array([[1, 0], [0, 2], [1, 0], [0, 1]])
    np.testing.assert_array_equal(counts[alike(counts)], [[0, 1], [0, 2], [1, 0], [1, 0]])


def test_bad_requests_are_named(model, variables):
    with pytest.raises(UsageError, match="this is a RoutedLM"):
        routed(routed(model))
    with pytest.raises(UsageError, match="take at least one row together"):
        routed(model, group=0)
    with pytest.raises(UsageError, match="margin=-1"):
        routed(model).block.clone(margin=-1.0)
    held = with_routers(routed(model), variables, jax.random.key(0))
    with pytest.raises(UsageError, match="group=3 does not divide a batch of 4"):
        along(routed(model, group=3), held, counts=COUNTS)
    recurrent = routed(of(Mamba(state=4)), group=1)
    with pytest.raises(UsageError, match="this mixer keeps State: set group=None"):
        recurrent.apply(
            drawn(recurrent), jnp.asarray(TOKENS[:, :2]), recurrent.init_cache(4, 8), method="step"
        )
