"""A language model that decodes by a softmax in parts says what it says without."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from effjax.config import build
from effjax.decoding.generate import generate, left_pad
from effjax.decoding.policies.heavy_hitters import HeavyHitters
from effjax.decoding.policies.kvmerger import KVMerger
from effjax.decoding.policies.policy import Policy
from effjax.decoding.policies.recycled import RecycledAttention
from effjax.decoding.policies.window import Window
from effjax.decoding.sampling import Sampling
from effjax.decoding.storage.quantised import Quantised
from effjax.errors import UsageError
from effjax.interop import load_variables
from effjax.mixers import unified_softmax
from effjax.mixers.attention import Attention
from effjax.mixers.unified_softmax import UnifiedSoftmax
from effjax.models.lm import LM
from pallas_kernels import decode_attention
from tests.decoding.policies.common import BLOCK, stepwise, toy, variables
from tests.interop.test_fixtures import FIXTURES, read

SIZE = 21
WIDE = UnifiedSoftmax(splits=4)  # 21 slots are cut into parts of 6
NARROW = UnifiedSoftmax(low=-0.5, high=0.5, splits=4)


def gentle(cache=None):
    """Scores between -5 and 5; those of the toy as it is reach beyond 200, where e to them is infinite."""
    return toy(cache, block=BLOCK | dict(mixer=BLOCK["mixer"] | dict(scale=0.01)))


MODELS = {"within": (gentle(), WIDE), "outside": (gentle(), NARROW), "infinite": (toy(), WIDE)}


@pytest.fixture
def tokens(draw):
    return draw.integers(0, 17, (3, SIZE))


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("lengths", [(SIZE,) * 3, (21, 9, 14)], ids=["full", "padded"])
def test_logits_are_those_of_the_softmax(tokens, case, lengths):
    model, unified = MODELS[case]
    plain, _, _ = stepwise(model, tokens, 6, lengths)
    logits, _, _ = stepwise(unified.applied(model), tokens, 6, lengths)
    tokens_there = np.arange(5, SIZE) >= SIZE - np.asarray(lengths)[:, None]
    np.testing.assert_allclose(logits[tokens_there], plain[tokens_there], atol=1e-5)
    assert not np.array_equal(logits, plain)


def marked(q, parts, scale, cap):
    return jnp.full((q.shape[0], q.shape[2], q.shape[1], parts[1].shape[-1]), 7.0)


def test_scores_that_leave_the_range_are_computed_again_and_others_are_not(monkeypatch, tokens):
    """What recomputes is replaced, and tells by its numbers that it ran."""
    monkeypatch.setattr(unified_softmax, "_with_maximum", marked)
    for case, (model, unified) in MODELS.items():
        plain, _, _ = stepwise(model, tokens, 6)
        logits, _, _ = stepwise(unified.applied(model), tokens, 6)
        assert (float(jnp.max(jnp.abs(logits[:, 1:] - plain[:, 1:]))) > 0.1) == (case != "within")


@pytest.mark.parametrize("case", MODELS)
def test_texts_are_the_same(draw, case):
    model, unified = MODELS[case]
    rows, lengths = left_pad([draw.integers(0, 17, size).tolist() for size in (9, 3, 12)])
    texts = [
        generate(way, variables(), rows, lengths, 12, jax.random.key(1), Sampling(temperature=0.0))
        for way in (model, unified.applied(model))
    ]
    np.testing.assert_array_equal(*texts)
    assert len(np.unique(texts[0])) > 3


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_recorded_logits_of_transformers_come_out_token_by_token(family):
    """Grouped queries in Llama; capped scores and layers of two windows in Gemma 2."""
    path = next(path for path in FIXTURES if path.stem == f"transformers_{family}")
    source, config, weights, (tokens,), output = read(path)
    model, held = load_variables(source, weights, config)
    model = UnifiedSoftmax(splits=3).applied(model)

    @jax.jit
    def decoded(held, tokens):
        def one(caches, token):
            logits, caches = model.apply(held, token[:, None], caches, method="step")
            return caches, logits[:, 0]

        return jax.lax.scan(one, model.init_cache(*tokens.shape), tokens.T)[1].swapaxes(0, 1)

    logits = decoded(held, jnp.asarray(tokens))
    np.testing.assert_allclose(logits, output, atol=1e-4 * np.abs(output).max())


@pytest.mark.parametrize(
    "policy",
    [
        Window(budget=9, sinks=2),
        KVMerger(budget=9, sinks=1, epsilon=0.3),
        HeavyHitters(budget=9),
        RecycledAttention(budget=8, stride=4, pool=1),
        Policy(storage=Quantised(bits=8, group=4, residual=4)),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_it_stands_beside_every_policy(tokens, policy):
    plain, _, _ = stepwise(gentle(policy), tokens, 6)
    logits, _, _ = stepwise(WIDE.applied(gentle(policy)), tokens, 6)
    np.testing.assert_allclose(logits, plain, atol=1e-5)


def test_a_model_of_llama_in_bfloat16(tokens):
    held = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables())
    said = []
    for model in (gentle(), WIDE.applied(gentle())):
        caches = model.init_cache(3, SIZE, jnp.bfloat16)
        step = jax.jit(functools.partial(model.apply, method="step"))
        _, caches = step(held, tokens[:, :-1], caches)
        said.append(step(held, tokens[:, -1:], caches)[0])
    np.testing.assert_allclose(said[1], said[0], atol=0.05)


def test_a_config_names_it():
    mixer = BLOCK["mixer"] | dict(unified=dict(phi=2.0, low=-9.0, splits=3))
    model = build(LM, dict(block=BLOCK | dict(mixer=mixer), vocab=17, dim=16, depth=2), "model")
    assert model == UnifiedSoftmax(2.0, -9.0, splits=3).applied(toy())


def test_a_model_without_attention_is_refused():
    model = toy(block=dict(mixer=dict(kind="mamba"), ffn=None))
    with pytest.raises(UsageError, match="Mamba sums no softmax over cached keys"):
        UnifiedSoftmax().applied(model)
    with pytest.raises(UsageError, match="Mamba sums no softmax"):
        UnifiedSoftmax().applied(model.block.mixer)


def padded_prompts(draw):
    return left_pad([draw.integers(0, 17, size).tolist() for size in (9, 3, 12)])


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("implementation", ["kernel", "reference", "interpreted"])
def test_kernels_write_the_same(draw, monkeypatch, case, implementation):
    """With padding in front of the rows; the TPU's kernel is interpreted."""
    model, unified = MODELS[case]
    by_kernel = dataclasses.replace(unified, implementation="kernel")
    if implementation == "reference":
        by_kernel = dataclasses.replace(unified, implementation="reference")
    called = []
    if implementation == "interpreted":
        kernel = decode_attention.OP

        def interpreted(*arrays, implementation, interpret, **options):
            called.append(options["within"])
            return kernel(*arrays, implementation="tpu", interpret=pltpu.InterpretParams(), **options)

        monkeypatch.setattr(decode_attention, "OP", interpreted)
        # Of another number of parts, which is nothing to kernels: what was compiled is not found again.
        by_kernel = dataclasses.replace(by_kernel, splits=3)
    rows, lengths = padded_prompts(draw)
    texts = [
        generate(way, variables(), rows, lengths, 12, jax.random.key(1), Sampling(temperature=0.0))
        for way in (model, by_kernel.applied(model))
    ]
    np.testing.assert_array_equal(*texts)
    assert len(np.unique(texts[0])) > 3
    assert bool(called) == (implementation == "interpreted")


@pytest.mark.parametrize("lengths", [(SIZE,) * 3, (21, 9, 14)], ids=["full", "padded"])
def test_logits_of_kernels_are_those_of_the_softmax(tokens, lengths):
    plain, _, _ = stepwise(gentle(), tokens, 6, lengths)
    unified = dataclasses.replace(WIDE, implementation="kernel")
    logits, _, _ = stepwise(unified.applied(gentle()), tokens, 6, lengths)
    tokens_there = np.arange(5, SIZE) >= SIZE - np.asarray(lengths)[:, None]
    np.testing.assert_allclose(logits[tokens_there], plain[tokens_there], atol=1e-5)


def test_a_token_is_lowered_with_the_kernel_of_the_platform():
    """And a prompt without one."""
    q = jax.ShapeDtypeStruct((2, 1, 4, 128), jnp.bfloat16)
    cached = jax.ShapeDtypeStruct((2, 256, 2, 128), jnp.bfloat16)
    allowed = jax.ShapeDtypeStruct((2, 1, 1, 256), jnp.bool_)
    options = dict(share=None, top=None, causal=False, scale=None, cap=None)
    for implementation, expected in (("kernel", True), ("reference", False), ("parts", False)):
        layer = Attention(heads=4, kv_heads=2, unified=UnifiedSoftmax(implementation=implementation))
        taken = jax.jit(lambda *x, layer=layer: layer.taken(*x, None, options))
        text = taken.trace(q, cached, cached, allowed).lower(lowering_platforms=("tpu",)).as_text()
        assert ("tpu_custom_call" in text) == expected
