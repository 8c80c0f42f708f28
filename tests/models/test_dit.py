"""DiT against its published sizes, its equations in float64 NumPy, and what adaLN-Zero promises."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from configs.diffusion.dit import get_config
from effjax import models
from effjax.config import build_kind
from effjax.errors import UsageError
from effjax.ffn.mlp import MLP
from effjax.layers.modulation import time_frequencies
from effjax.layers.patches import sincos_table
from effjax.mixers.attention import Attention
from effjax.mixers.context import Context
from effjax.models.blocks.adaln import DiTBlock, Layer
from effjax.models.dit import DiT


def tiny(**changes):
    block = DiTBlock(mixer=Attention(heads=2), ffn=MLP(activation="gelu_tanh"))
    fields = {"block": block, "patch": 2, "dim": 8, "depth": 2, "classes": 3, "frequencies": 6}
    return DiT(**{**fields, **changes})


def inputs(batch=2, size=4, channels=2):
    x = np.random.default_rng(5).normal(size=(batch, size, size, channels)).astype(np.float32)
    return jnp.asarray(x), jnp.linspace(1.0, 900.0, batch), jnp.arange(batch) % 4


def initialised(model):
    """Freshly initialised parameters, without their axis names."""
    return meta.unbox(jax.jit(model.init)(jax.random.key(0), *inputs()))["params"]


def randomised(model):
    """Parameters with no zeros, so that every path counts."""
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs()))["params"]
    draw = np.random.default_rng(9)
    return jax.tree.map(lambda s: jnp.asarray(0.3 * draw.normal(size=s.shape), s.dtype), shapes)


def run(model, params, *args, **options):
    return jax.jit(lambda p, *a: model.apply({"params": p}, *a, **options))(params, *args)


@pytest.mark.parametrize(
    ("variant", "millions", "exact"),
    [("s2", 33, None), ("b2", 130, None), ("l2", 458, None), ("xl2", 675, 674_834_720)],
)
def test_parameters_are_those_of_the_paper(variant, millions, exact):
    model = build_kind(models.KINDS, get_config(variant).model, "config.model")
    shapes = jax.eval_shape(
        model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 4)), jnp.zeros(1), jnp.zeros(1, int)
    )
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert round(count / 1e6) == millions
    assert exact is None or count == exact


def test_output_is_zero_and_blocks_are_the_identity_at_first():
    model = tiny()
    out = run(model, initialised(model), *inputs())
    assert out.shape == (2, 4, 4, 4)  # mean and variance share
    np.testing.assert_array_equal(out, 0.0)

    tokens, c = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 8))), jnp.ones((2, 8))
    got = jax.jit(lambda key: model.block.init_with_output(key, tokens, Layer(), c, Context())[0][0])
    np.testing.assert_array_equal(got(jax.random.key(3)), tokens)


def test_initial_spread_follows_the_paper():
    params = initialised(tiny(dim=64, depth=3, frequencies=256, classes=500))
    assert np.std(params["label_embed"]["embedding"]) == pytest.approx(0.02, rel=0.05)
    for layer in ("expand", "contract"):
        assert np.std(params["time_embed"][layer]["kernel"]) == pytest.approx(0.02, rel=0.05)
    bound = math.sqrt(6 / (64 + 256))  # Xavier's uniform bound of the first FFN layer
    kernel = params["blocks"]["ffn"]["expand"]["kernel"]
    assert bound * 0.99 < np.max(np.abs(kernel)) <= bound
    patches = params["embed"]["projection"]["kernel"]  # fans of the flattened patch, not of a convolution
    assert math.sqrt(6 / (8 + 64)) * 0.97 < np.max(np.abs(patches)) <= math.sqrt(6 / (8 + 64))
    for zero in (params["blocks"]["modulation"], params["modulation"], params["output"]):
        assert all(not np.any(leaf) for leaf in jax.tree.leaves(zero))


def numpy_dit(p, x, t, label, heads=2, patch=2):
    """The network again in float64, one picture at a time, from the equations of the paper."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), p)

    def silu(a):
        return a / (1 + np.exp(-a))

    def gelu(a):
        return 0.5 * a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))

    def norm(a):
        return (a - a.mean(-1, keepdims=True)) / np.sqrt(a.var(-1, keepdims=True) + 1e-6)

    def attend(w, a):
        q, k, v = (np.einsum("nc,chd->hnd", a, w[n]["kernel"]) + w[n]["bias"][:, None] for n in PROJECTIONS)
        logits = np.einsum("hnd,hmd->hnm", q, k) / np.sqrt(q.shape[-1])
        weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        return np.einsum("hnm,hmd,hdc->nc", weights, v, w["output"]["kernel"]) + w["output"]["bias"]

    size, channels = x.shape[0], x.shape[-1]
    side = size // patch
    rows = [
        x[i * patch : (i + 1) * patch, j * patch : (j + 1) * patch].reshape(-1)
        for i in range(side)
        for j in range(side)
    ]
    z = np.stack(rows) @ p["embed"]["projection"]["kernel"] + p["embed"]["projection"]["bias"]
    z = z + sincos_table((side, side), z.shape[-1])

    half = p["time_embed"]["expand"]["kernel"].shape[0] // 2
    angle = t * 10_000.0 ** (-np.arange(half) / half)
    h = np.concatenate([np.cos(angle), np.sin(angle)])
    h = silu(h @ p["time_embed"]["expand"]["kernel"] + p["time_embed"]["expand"]["bias"])
    c = h @ p["time_embed"]["contract"]["kernel"] + p["time_embed"]["contract"]["bias"]
    c = silu(c + p["label_embed"]["embedding"][label])

    blocks = p["blocks"]
    for layer in range(blocks["modulation"]["projection"]["bias"].shape[0]):
        w = jax.tree.map(lambda leaf, layer=layer: leaf[layer], blocks)
        m = (
            np.einsum("c,cpd->pd", c, w["modulation"]["projection"]["kernel"])
            + w["modulation"]["projection"]["bias"]
        )
        z = z + m[2] * attend(w["mixer"], norm(z) * (1 + m[1]) + m[0])
        a = norm(z) * (1 + m[4]) + m[3]
        a = gelu(a @ w["ffn"]["expand"]["kernel"] + w["ffn"]["expand"]["bias"])
        z = z + m[5] * (a @ w["ffn"]["contract"]["kernel"] + w["ffn"]["contract"]["bias"])

    w = p["modulation"]["projection"]
    shift, scale = np.einsum("c,cpd->pd", c, w["kernel"]) + w["bias"]
    z = (norm(z) * (1 + scale) + shift) @ p["output"]["kernel"] + p["output"]["bias"]
    out = np.zeros((size, size, 2 * channels))
    for n, token in enumerate(z):
        i, j = patch * (n // side), patch * (n % side)
        out[i : i + patch, j : j + patch] = token.reshape(patch, patch, -1)
    return out


PROJECTIONS = ("query", "key", "value")


def test_parity_with_the_equations():
    model = tiny()
    params = randomised(model)
    x, t, label = inputs()
    got = run(model, params, x, t, label)
    for i in range(2):
        expected = numpy_dit(params, np.asarray(x[i], np.float64), float(t[i]), int(label[i]))
        assert np.max(np.abs(got[i] - expected)) <= 1e-5 * np.max(np.abs(expected))


def test_time_and_label_steer_every_example_alone():
    model = tiny()
    params = randomised(model)
    x, t, label = inputs()
    forward = jax.jit(lambda t, label: model.apply({"params": params}, x, t, label))
    base = forward(t, label)
    for other in (forward(t.at[1].add(50.0), label), forward(t, label.at[1].set(3))):  # 3: the null class
        np.testing.assert_allclose(other[0], base[0], rtol=1e-6, atol=1e-6)
        assert np.max(np.abs(other[1] - base[1])) > 1e-3


def test_null_class_and_sigma_change_the_shapes():
    def count(model):
        return sum(leaf.size for leaf in jax.tree.leaves(randomised(model)))

    full = count(tiny())
    assert full - count(tiny(null_class=False)) == 8
    assert full - count(tiny(learned_sigma=False)) == (8 + 1) * 2 * 2 * 2  # half of the output layer


def test_gradients_reach_every_parameter_and_are_finite():
    model = tiny(remat="full")
    params = randomised(model)
    x, t, label = inputs()

    def loss(params):
        return jnp.mean(model.apply({"params": params}, x, t, label, train=True) ** 2)

    grads = jax.jit(jax.grad(loss))(params)
    for path, leaf in jax.tree_util.tree_flatten_with_path(grads)[0]:
        assert np.all(np.isfinite(leaf)), path
        if "key" not in jax.tree_util.keystr(path) or "bias" not in jax.tree_util.keystr(path):
            assert np.any(leaf != 0), path  # a bias of all keys cancels in the softmax


def test_bfloat16_follows_the_parameters_and_keeps_the_time():
    model = tiny()
    params = randomised(model)
    x, t, label = inputs()
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    out = run(model, half, x.astype(jnp.bfloat16), t, label)
    assert out.dtype == jnp.bfloat16
    full = run(model, params, x, t, label)
    assert np.max(np.abs(out.astype(jnp.float32) - full)) < 0.1 * np.max(np.abs(full))


def test_time_frequencies_are_cosines_then_sines():
    got = time_frequencies(jnp.array([0.0, 999.0]), 256)
    np.testing.assert_array_equal(got[0], [1.0] * 128 + [0.0] * 128)
    assert got[1, 0] == pytest.approx(math.cos(999.0), abs=1e-4)
    assert got[1, 128 + 127] == pytest.approx(math.sin(999.0 * 1e4 ** (-127 / 128)), abs=1e-4)


def test_picture_that_patches_do_not_tile_is_refused():
    x, t, label = inputs(size=5)
    with pytest.raises(UsageError, match="5 x 5 cannot be cut into patches of 2 x 2"):
        tiny().init(jax.random.key(0), x, t, label)


@pytest.mark.slow
def test_a_condition_a_block_that_is_alike_everywhere_is_the_shared_one():
    shared, own = tiny(), tiny(condition="per_block")
    params = randomised(shared)
    each = {name: params[name] for name in ("time_embed", "label_embed")}
    rest = {name: leaf for name, leaf in params.items() if name not in each}
    alike = {**rest, "conditions": jax.tree.map(lambda a: jnp.stack([a, a]), each)}
    np.testing.assert_allclose(
        run(own, alike, *inputs()), run(shared, params, *inputs()), rtol=1e-5, atol=1e-5
    )
    # The last modulation reads the first block's: changing the second block's leaves it alone.
    silent = jax.tree.map(jnp.zeros_like, alike["blocks"]["modulation"])
    alike = {**alike, "blocks": {**alike["blocks"], "modulation": silent}}
    table = alike["conditions"]["label_embed"]["embedding"]
    second, first = table.at[1].add(1.0), table.at[0].add(1.0)

    def output(table):
        conditions = {**alike["conditions"], "label_embed": {"embedding": table}}
        return run(own, {**alike, "conditions": conditions}, *inputs())

    np.testing.assert_array_equal(output(second), output(table))
    assert np.max(np.abs(output(first) - output(table))) > 1e-3


def test_frequencies_may_end_at_the_lowest():
    got = time_frequencies(jnp.array([999.0]), 256, inclusive=True)
    assert got[0, 128] == pytest.approx(math.sin(999.0), abs=1e-4)
    assert got[0, 255] == pytest.approx(math.sin(999.0 * 1e-4), abs=1e-6)


def test_the_norm_before_the_ffn_may_differ():
    block = DiTBlock(mixer=Attention(heads=2), ffn=MLP(), ffn_epsilon=1e3, ffn_affine=True)
    model = tiny(block=block)
    params = randomised(model)
    assert params["blocks"]["ffn_norm"].keys() == {"scale", "bias"}
    small = tiny(block=block.clone(ffn_epsilon=None))
    assert np.max(np.abs(run(model, params, *inputs()) - run(small, params, *inputs()))) > 1e-3
