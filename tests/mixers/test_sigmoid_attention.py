"""Sigmoid attention in a model: its equation, its implementations, its cache, and what the bias is for."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from effjax.errors import UsageError
from effjax.measure import count
from effjax.mixers import Attention, SigmoidAttention
from effjax.mixers.context import Context

N, WIDTH = 12, 16
FIELDS = dict(heads=4, kv_heads=2, head_dim=8, causal=True, length=N, qkv_bias=False, out_bias=False)


@functools.cache
def params():
    x = jnp.zeros((1, N, WIDTH))
    shapes = meta.unbox(jax.eval_shape(SigmoidAttention(**FIELDS).init, jax.random.key(0), x, Context()))
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: np.float32(0.4 * draw.normal(size=leaf.shape)), shapes)


def tokens(batch=2):
    return jnp.float32(np.random.default_rng(1).normal(size=(batch, N, WIDTH)))


def apply(x, context=None, **fields):
    mixer = SigmoidAttention(**(FIELDS | fields))
    return jax.jit(mixer.apply)(params(), x, context or Context())


def by_hand(x, seen, bias):
    w = {name: np.asarray(p["kernel"], np.float64) for name, p in params()["params"].items()}
    q, k, v = (np.einsum("bnc,chd->bnhd", np.float64(x), w[name]) for name in ("query", "key", "value"))
    k, v = (np.repeat(array, 2, axis=2) for array in (k, v))
    weights = 1 / (1 + np.exp(-(np.einsum("bnhd,bshd->bhns", q, k) / np.sqrt(8) + bias)))
    return np.einsum("bhns,bshd,hdc->bnc", weights * seen, v, w["output"])


def test_is_its_equation():
    seen = np.tril(np.ones((N, N)))
    np.testing.assert_allclose(apply(tokens()), by_hand(tokens(), seen, -np.log(N)), rtol=1e-4, atol=1e-5)
    longer = by_hand(tokens(), seen, -np.log(100))
    np.testing.assert_allclose(apply(tokens(), length=100), longer, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        apply(tokens(), logit_bias=0.3), by_hand(tokens(), seen, 0.3), rtol=1e-4, atol=1e-5
    )


def test_documents_and_padding_are_not_seen():
    segments = np.repeat([[1, 2]], [5, 7], axis=1).astype(np.int32)
    valid = np.arange(N)[None] != 6
    seen = np.tril(segments[0][:, None] == segments[0][None, :]) & valid[0][None, :]
    context = Context(segments=jnp.asarray(segments), valid=jnp.asarray(valid))
    found = apply(tokens(1), context)
    np.testing.assert_allclose(found, by_hand(tokens(1), seen, -np.log(N)), rtol=1e-4, atol=1e-5)


def test_the_reference_gives_the_same_and_so_do_slopes():
    def slopes(**fields):
        mixer = SigmoidAttention(**(FIELDS | fields))
        loss = lambda p: jnp.sum(mixer.apply(p, tokens(), Context()) ** 2)
        return jax.tree.leaves(jax.jit(jax.value_and_grad(loss))(params()))

    for chosen, reference in zip(slopes(), slopes(implementation="reference"), strict=True):
        np.testing.assert_allclose(chosen, reference, rtol=1e-5, atol=1e-6)


def test_steps_give_what_the_whole_gives():
    mixer = SigmoidAttention(**FIELDS, rotary_base=1e4)
    x = tokens(1)
    whole = jax.jit(mixer.apply)(params(), x, Context())
    step = jax.jit(lambda x, cache: mixer.apply(params(), x, cache, Context(), method="step"))
    y, cache = step(x[:, :8], mixer.init_cache(1, N, WIDTH))
    found = [y]
    for n in range(8, N):
        y, cache = step(x[:, n : n + 1], cache)
        found.append(y)
    np.testing.assert_allclose(jnp.concatenate(found, 1), whole, rtol=1e-4, atol=1e-5)


def test_the_bias_keeps_rows_as_large_as_softmax_does():
    """With b = -log n a row of weights sums to about one, without it to about n / 2."""
    weights = lambda **fields: SigmoidAttention(**(FIELDS | fields)).weights(
        *qk, jnp.ones((1, 1, 1, 512), bool), None
    )
    qk = jnp.float32(np.random.default_rng(2).normal(size=(2, 1, 512, 1, 64)))
    with_bias, without = (jnp.mean(weights(logit_bias=b).sum(-1)) for b in (-np.log(512), 0.0))
    np.testing.assert_allclose(with_bias, np.exp(0.5), rtol=0.05)
    np.testing.assert_allclose(without, 256, rtol=0.05)


def test_a_program_for_several_devices_has_the_kernel():
    """Cut by rows and heads; nothing else would be lowered without a warning, which is an error here."""
    mesh = AbstractMesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    rules = (("batch", "data"), ("heads", "tensor"), ("kv_heads", "tensor"))
    mixer = SigmoidAttention(**FIELDS)
    shapes = jax.eval_shape(params)
    run = lambda p, x: mixer.apply(p, x, Context(valid=jnp.ones(x.shape[:2], bool)))
    with jax.sharding.use_abstract_mesh(mesh), nn.logical_axis_rules(rules):
        cut = NamedSharding(mesh, PartitionSpec("data"))
        traced = jax.jit(run, in_shardings=(NamedSharding(mesh, PartitionSpec()), cut)).trace(
            shapes, jax.eval_shape(tokens)
        )
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 1


def test_work_is_that_of_softmax_attention():
    fields = {name: value for name, value in FIELDS.items() if name != "length"}
    macs = lambda mixer: count(lambda p, x: mixer.apply(p, x, Context()), params(), tokens()).macs
    assert macs(SigmoidAttention(**FIELDS)) == macs(Attention(**fields))


@pytest.mark.parametrize(
    ("fields", "context", "message"),
    [
        (dict(window=3), Context(), "has no window"),
        (dict(top=2), Context(), "has no top"),
        ({}, Context(size=jnp.ones((2, N))), "has no context.size"),
    ],
)
def test_what_is_of_softmax_alone(fields, context, message):
    with pytest.raises(UsageError, match=message):
        SigmoidAttention(**(FIELDS | fields)).apply(params(), tokens(), context)


def test_decoding_needs_the_length_of_training():
    mixer = SigmoidAttention(**(FIELDS | dict(length=None)))
    with pytest.raises(UsageError, match=r"set mixer\.length"):
        mixer.apply(params(), tokens()[:, :1], mixer.init_cache(2, N, WIDTH), Context(), method="step")
