"""Attention at a low resolution, and attention to pooled keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.errors import UsageError
from effjax.measure.cost import count
from effjax.mixers.attention import Attention
from effjax.mixers.context import Context
from effjax.mixers.lowtention import Lowtention
from effjax.mixers.multi_head_conv import MultiHeadConv
from effjax.mixers.pooled_attention import PooledAttention


def drawn(module, x):
    """Random variables; scales and running variances are positive."""
    shapes = meta.unbox(jax.eval_shape(module.init, jax.random.key(0), x, Context()))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if jax.tree_util.keystr(path[-1:], simple=True) in ("scale", "var"):
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), jnp.float32)
        return jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


X = jax.random.normal(jax.random.key(2), (2, 4, 6, 12))


IDENTITY = jnp.zeros((3, 3, 12)).at[1, 1].set(1.0)


@pytest.mark.parametrize("upsampling", ["dense", "depthwise"])
def test_without_stride_and_compression_it_is_attention(upsampling):
    """Row (b) of its checks: convolutions that do nothing leave multi-head attention on the same weights."""
    plain = Attention(heads=3, qkv_bias=False)
    tokens = X.reshape(2, 24, 12)
    held = drawn(plain, tokens)["params"]
    expected = plain.apply({"params": held}, tokens, Context()).reshape(X.shape)
    module = Lowtention(3, 4, stride=1, kernel=3, upsampling=upsampling, epsilon=0.0)
    variables = drawn(module, X)
    stats, params = variables["batch_stats"]["down"]["norm"], variables["params"]
    nothing = dict(scale=jnp.ones(12), bias=jnp.zeros(12))
    params["down"]["norm"], stats["mean"], stats["var"] = nothing, jnp.zeros(12), jnp.ones(12)
    params["down"]["conv"]["kernel"] = IDENTITY
    for name in ("query", "key", "value"):
        params[name] = held[name]
    if upsampling == "depthwise":
        params["output"] = held["output"]
        params["up"] = dict(kernel=IDENTITY, bias=jnp.zeros(12))
    else:
        matrix = held["output"]["kernel"].reshape(12, 12)
        params["up"]["kernel"] = jnp.zeros((3, 3, 12, 12)).at[1, 1].set(matrix)
        params["up"]["bias"] = held["output"]["bias"]
    np.testing.assert_allclose(module.apply(variables, X, Context()), expected, atol=1e-5)


def attention_macs(module, side=16):
    x = jax.ShapeDtypeStruct((1, side, side, 24), jnp.float32)
    shapes = meta.unbox(jax.eval_shape(module.init, jax.random.key(0), x, Context()))
    return count(lambda held, x: module.apply(held, x, Context()), shapes, x).macs_by_kind["attention"]


def test_its_cost_falls_with_the_fourth_power_of_the_stride_and_with_the_compression():
    """Row (d) of its checks: 2 (N / s^2)^2 C / c."""
    for stride, head_dim in ((1, 8), (2, 8), (2, 4), (4, 4)):
        module = Lowtention(3, head_dim, stride=stride, kernel=5 if stride > 1 else 3)
        assert attention_macs(module) == 2 * (256 // stride**2) ** 2 * 3 * head_dim


@pytest.mark.parametrize("sides", [(5, 7), (4, 6), (1, 1)])
def test_any_map_keeps_its_size(sides):
    module = Lowtention(3, 2)
    x = jax.random.normal(jax.random.key(0), (1, *sides, 12))
    assert jax.eval_shape(module.apply, drawn(module, x), x, Context()).shape == x.shape


def test_pools_are_neighbours_in_a_row_and_what_is_left_is_dropped():
    module = PooledAttention(heads=3, pool=2, epsilon=1e-5)
    x = X[:, :3, :3]  # nine places: two pools of four, and one over
    held = drawn(module, x)
    p, stats = (jax.tree.map(lambda a: np.asarray(a, np.float64), held[c]) for c in ("params", "batch_stats"))
    tokens = np.asarray(x, np.float64).reshape(2, 9, 12)
    z = np.stack([tokens[:, :4].mean(1), tokens[:, 4:8].mean(1)], 1)
    z = (z - stats["norm"]["mean"]) / np.sqrt(stats["norm"]["var"] + 1e-5)
    z = z * p["norm"]["scale"] + p["norm"]["bias"]
    q, k, v = (
        np.einsum("bnc,chd->bnhd", given, p[name]["kernel"]) + p[name]["bias"]
        for name, given in (("query", tokens), ("key", z), ("value", z))
    )
    weights = np.exp(np.einsum("bnhd,bmhd->bhnm", q, k) / 2)
    weights /= weights.sum(-1, keepdims=True)
    y = np.einsum("bhnm,bmhd->bnhd", weights, v)
    y = np.einsum("bnhd,hdc->bnc", y, p["output"]["kernel"]) + p["output"]["bias"]
    np.testing.assert_allclose(module.apply(held, x, Context()), y.reshape(x.shape), rtol=1e-4, atol=1e-4)


def test_without_pools_it_is_attention():
    module, plain, tokens = PooledAttention(heads=3), Attention(heads=3), X.reshape(2, 24, 12)
    held = drawn(module, X)
    expected = plain.apply(held, tokens, Context()).reshape(X.shape)
    np.testing.assert_allclose(module.apply(held, X, Context()), expected, atol=1e-5)


def test_logits_of_any_size_leave_no_nan():
    held = drawn(PooledAttention(heads=3), X)
    y = jax.jit(lambda x: PooledAttention(heads=3).apply(held, x, Context()))(X * 1e6)
    assert bool(jnp.isfinite(y).all())


def test_heads_of_the_convolution_do_not_see_each_other():
    module = MultiHeadConv(head_dim=4)
    held = drawn(module, X)
    held["params"]["project"]["kernel"] = jnp.eye(12)
    before, after = (module.apply(held, x, Context()) for x in (X, X.at[..., :4].add(1.0)))
    assert not np.allclose(before[..., :4], after[..., :4])
    np.testing.assert_allclose(before[..., 4:], after[..., 4:], atol=1e-6)


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (PooledAttention(heads=5), "heads=5 does not divide the width 12"),
        (PooledAttention(heads=3, pool=8), r"fewer than the 64 places of one pool.*pool=4"),
        (MultiHeadConv(head_dim=8), "heads of 8 channels do not tile the width 12"),
    ],
)
def test_wrong_requests_end_in_one_message(module, said):
    with pytest.raises(UsageError, match=said):
        module.init(jax.random.key(0), X, Context())


@pytest.mark.parametrize(
    "module",
    [
        Lowtention(3, 2),
        Lowtention(3, 2, stride=1, kernel=3, upsampling="depthwise"),
        PooledAttention(3, 2),
        MultiHeadConv(4),
    ],
)
def test_gradients_are_those_of_finite_differences(module):
    held = drawn(module, X)
    weights = jax.random.normal(jax.random.key(3), X.shape)

    @jax.jit
    def loss(params):
        return jnp.sum(weights * module.apply({**held, "params": params}, X, Context()))

    params = held["params"]
    gradient = jax.jit(jax.grad(loss))(params)
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient)))
    ahead, behind = (
        loss(jax.tree.map(lambda p, g, s=sign: p + s * 1e-2 * g / norm, params, gradient)) for sign in (1, -1)
    )
    np.testing.assert_allclose((ahead - behind) / 2e-2, norm, rtol=1e-2)
