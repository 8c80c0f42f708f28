"""Language models that decode with the kernel of active neurons, which is interpreted here."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from effjax.compress.cats import thresholded
from effjax.compress.rows import by_rows
from effjax.errors import UsageError
from effjax.ffn import CATS, Gated
from effjax.ffn.spark import SparkFFN
from effjax.mixers import Attention
from effjax.models.lm import LM, DecoderBlock
from pallas_kernels import sparse_ffn

VOCAB, WIDTH, HIDDEN = 32, 256, 320
TOKENS = jax.random.randint(jax.random.key(0), (1, 5), 0, VOCAB)


@functools.cache
def made(kind):
    """A language model of two layers, with weights that are not small; CATS leaves half its neurons out."""
    mixer = Attention(2, qkv_bias=False, out_bias=False, rotary_base=1e4, causal=True)
    ffn = Gated(HIDDEN) if kind == "cats" else SparkFFN(HIDDEN, predictor=128, active=40)
    model = LM(DecoderBlock(mixer, ffn), vocab=VOCAB, dim=WIDTH, depth=2, tied=True)
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(1), TOKENS))
    draw = np.random.default_rng(2)
    held = jax.tree.map(lambda leaf: np.float32(0.1 * draw.normal(size=leaf.shape)), shapes)
    return (model, held) if kind == "spark" else thresholded(model, held, np.full(2, 0.3, np.float32))


@pytest.fixture
def called(monkeypatch):
    """The TPU's kernel in place of the choice; what is noted is how many neurons it was told of."""
    told = []

    def interpreted(op, *arrays, implementation, interpret, strict, active):
        if implementation == "reference":
            return op(*arrays, implementation="reference", active=active)
        told.append(active)
        return op(*arrays, implementation="tpu", interpret=pltpu.InterpretParams(), active=active)

    monkeypatch.setattr(sparse_ffn, "OP", functools.partial(interpreted, sparse_ffn.OP))
    return told


def decoded(kind, implementation):
    """Four tokens behind the prompt, each the likeliest, and the logits that say so."""
    model, held = by_rows(*made(kind), implementation)
    step = jax.jit(functools.partial(model.apply, method="step"))
    logits, caches = step(held, TOKENS, model.init_cache(1, 9))
    tokens, all_logits = [], []
    for _ in range(4):
        tokens.append(jnp.argmax(logits[:, -1:], axis=-1))
        logits, caches = step(held, tokens[-1], caches)
        all_logits.append(logits)
    return np.concatenate(tokens, 1), np.concatenate(all_logits, 1)


@pytest.mark.parametrize(("kind", "active"), [("cats", None), ("spark", 40)])
def test_decoding_by_the_kernel_writes_the_same_tokens(kind, active, called):
    reference, wanted = decoded(kind, "reference")
    plain, _ = decoded(kind, "plain")
    assert not called
    tokens, logits = decoded(kind, "kernel")
    assert called
    assert set(called) == {active}
    np.testing.assert_array_equal(tokens, reference)
    np.testing.assert_array_equal(tokens, plain)
    np.testing.assert_allclose(logits, wanted, atol=2e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("implementation", ["reference", "kernel"])
def test_without_a_kernel_the_reference_decodes(implementation):
    plain, wanted = decoded("cats", "plain")
    tokens, logits = decoded("cats", implementation)
    np.testing.assert_array_equal(tokens, plain)
    np.testing.assert_allclose(logits, wanted, atol=1e-4 * np.abs(wanted).max())


def shapes():
    """Of the variables of a small CATS, without the partitions that they are boxed in."""
    x = jax.ShapeDtypeStruct((1, 1, 128), jnp.float32)
    return meta.unbox(jax.eval_shape(CATS(256, by_rows=True).init, jax.random.key(0), x))


def lowered(implementation, variables, tokens=1, cut=None, **options):
    """How many kernels there are in the program for a TPU."""
    module = CATS(256, by_rows=True, implementation=implementation)
    apply = jax.jit(functools.partial(module.apply, **options), in_shardings=cut)
    traced = apply.trace(variables, jax.ShapeDtypeStruct((1, tokens, 128), jnp.float32))
    return traced.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call")


def test_a_single_token_is_lowered_with_the_kernel_of_the_platform():
    assert [lowered(way, shapes()) for way in ("plain", "reference", "kernel")] == [0, 0, 1]
    assert lowered("kernel", shapes(), tokens=3) == 0  # a prompt needs most rows
    assert lowered("kernel", shapes(), train=True) == 0


def test_on_several_devices_each_has_the_whole_step():
    """Anything else would be lowered without the kernel, and with a warning, which is an error here."""
    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,))
    variables = shapes()
    with jax.sharding.use_abstract_mesh(mesh), nn.logical_axis_rules([("batch", "data")]):
        assert lowered("kernel", variables, cut=NamedSharding(mesh, PartitionSpec())) == 1


def test_a_kernel_takes_what_is_stored_by_rows():
    with pytest.raises(UsageError, match="by_rows=True"):
        jax.eval_shape(CATS(8, implementation="kernel").init, jax.random.key(0), jnp.ones((1, 4)))
