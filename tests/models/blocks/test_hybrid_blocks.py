"""The inverted residual, MOAT, LowFormer's and Next-ViT's blocks."""

import importlib
from math import erf

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.errors import UsageError
from effjax.experiment import resolve
from effjax.ffn.mlp import MLP
from effjax.layers.squeeze_excite import SqueezeExcite
from effjax.mixers.context import Context
from effjax.mixers.position_bias import InterpolatedTable
from effjax.mixers.shifted_window import ShiftedWindow
from effjax.models.blocks.lowformer import LowFormer
from effjax.models.blocks.mbconv import MBConv, average_pool
from effjax.models.blocks.metaformer import Block
from effjax.models.blocks.moat import MOAT
from effjax.models.blocks.nextvit import NextConv, NextTransformer

# Whole networks: the whole suite has time for them.
pytestmark = pytest.mark.slow

RATE = jnp.zeros(())
X = jax.random.normal(jax.random.key(2), (2, 5, 6, 8))


def drawn(block, x=X):
    """Random variables; scales and running variances are positive."""
    shapes = meta.unbox(jax.eval_shape(block.init, jax.random.key(0), x, RATE, Context()))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if jax.tree_util.keystr(path[-1:], simple=True) in ("scale", "var"):
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), jnp.float32)
        return jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def run(block, held, x=X):
    return jax.jit(lambda held, x: block.apply(held, x, RATE, Context())[0])(held, x)


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(erf)(x / np.sqrt(2)))


def normalised(x, p, stats, epsilon):
    return (x - stats["mean"]) / np.sqrt(stats["var"] + epsilon) * p["scale"] + p["bias"]


def convolved(x, kernel, stride):
    """Depthwise, with zeros as TensorFlow's "same" puts them."""
    rows, columns = (-(-n // stride) for n in x.shape[1:3])
    total = [max((m - 1) * stride + 3 - n, 0) for m, n in zip((rows, columns), x.shape[1:3], strict=True)]
    padded = np.pad(x, ((0, 0), *((t // 2, t - t // 2) for t in total), (0, 0)))
    y = np.zeros((len(x), rows, columns, x.shape[-1]))
    for i in range(rows):
        for j in range(columns):
            window = padded[:, stride * i : stride * i + 3, stride * j : stride * j + 3]
            y[:, i, j] = (window * kernel).sum((1, 2))
    return y


@pytest.mark.parametrize("stride", [1, 2])
def test_the_inverted_residual_is_its_equation(stride):
    block = MBConv(
        12,
        stride,
        ratio=2.0,
        ratio_of="output",
        pre_norm="batch",
        outer_norm=None,
        squeeze=SqueezeExcite(hidden=3),
        padding="same",
        epsilon=1e-3,
    )
    held = drawn(block)
    p, s = (jax.tree.map(lambda a: np.asarray(a, np.float64), held[c]) for c in ("params", "batch_stats"))
    x = np.asarray(X, np.float64)
    h = normalised(x, p["norm"], s["norm"], 1e-3) @ p["expand"]["conv"]["kernel"]
    h = gelu(normalised(h, p["expand"]["norm"], s["expand"]["norm"], 1e-3))
    h = convolved(h, p["depthwise"]["conv"]["kernel"], stride)
    h = gelu(normalised(h, p["depthwise"]["norm"], s["depthwise"]["norm"], 1e-3))
    squeezed = h.mean((1, 2)) @ p["squeeze"]["reduce"]["kernel"] + p["squeeze"]["reduce"]["bias"]
    gate = np.maximum(squeezed, 0) @ p["squeeze"]["expand"]["kernel"] + p["squeeze"]["expand"]["bias"]
    h = h / (1 + np.exp(-gate))[:, None, None]
    h = h @ p["project"]["conv"]["kernel"] + p["project"]["conv"]["bias"]
    short = np.asarray(average_pool(X, 2, stride)) if stride > 1 else x
    short = short @ p["shortcut_project"]["kernel"] + p["shortcut_project"]["bias"]
    np.testing.assert_allclose(run(block, held), short + h, rtol=1e-4, atol=1e-4)


def test_pooling_counts_the_places_that_are_there():
    x = jnp.arange(15.0).reshape(1, 3, 5, 1)
    pooled = average_pool(x, 2, 2)[0, ..., 0]
    np.testing.assert_allclose(pooled, [[3.0, 5.0, 6.5], [10.5, 12.5, 14.0]])


def test_the_fused_form_has_more_products_and_fewer_layers():
    fused, plain = (drawn(MBConv(fused=f))["params"] for f in (True, False))
    assert fused["expand"]["conv"]["kernel"].shape == (3, 3, 8, 32)
    assert "depthwise" not in fused
    assert plain["expand"]["conv"]["kernel"].shape == (8, 32)
    assert plain["depthwise"]["conv"]["kernel"].shape == (3, 3, 32)


def moat(window):
    bias = InterpolatedTable(4)
    return MOAT(ShiftedWindow(2, window=window, bias=bias), MBConv(ratio_of="output", pre_norm="batch"))


def test_a_window_as_large_as_the_map_is_global_attention():
    x = X[:, :4, :4]
    held = drawn(moat(4), x)
    np.testing.assert_allclose(run(moat(4), held, x), run(moat(64), held, x), atol=1e-6)
    assert not np.allclose(run(moat(2), held, x), run(moat(64), held, x), atol=1e-3)


def reach(block, x):
    """Whether an output place depends on an input place in another window."""
    held = drawn(block, x)

    def far(x):
        for _ in range(2):
            x, _ = block.apply(held, x, RATE, Context())
        return x[0, 0, 0].sum()

    return bool(jnp.abs(jax.jit(jax.grad(far))(x)[0, 2:, 2:]).max() > 1e-6)


def test_windows_need_no_shift_where_convolutions_mix_neighbours():
    """Two blocks in windows of 2: MOAT's reach from one window to the next, a transformer's do not."""
    x = X[:1, :4, :4]
    assert reach(moat(2), x)
    transformer = Block(ShiftedWindow(2, window=2), MLP())
    assert not reach(transformer, x)


def test_a_table_of_positions_is_resized_to_the_window():
    small, large = (4, 4), (6, 5)
    table = InterpolatedTable(4)
    held = meta.unbox(table.init(jax.random.key(0), small, small, 2))
    rows, columns = np.meshgrid(np.linspace(-1, 1, 7), np.linspace(-1, 1, 7), indexing="ij")
    plane = np.stack([rows, 2 * columns], -1).reshape(49, 2).astype(np.float32)
    held["params"]["table"] = jnp.asarray(plane)
    here = np.asarray(table.apply(held, small, small, 2))  # [heads, places, places]
    assert here[0, 0, 5] == pytest.approx(-1 / 3)  # query at 0 0, key at 1 1
    assert here[1, 0, 5] == pytest.approx(-2 / 3)
    there = np.asarray(table.apply(held, large, large, 2))
    assert there.shape == (2, 30, 30)
    # A plane stays one; half a place is lost at either end, where bilinear sampling holds its value.
    step = (there[0, 11, 16] - there[0, 11, 11]) / (here[0, 0, 4] - here[0, 0, 0])
    assert step == pytest.approx(7 / 11, rel=1e-4)


def test_lowformer_runs_its_branches_one_after_another():
    local = MBConv(fused=True, activation="hard_swish", inner_bias=True)
    block = LowFormer(None, MLP(ratio=2.0), local)
    held = drawn(block)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), held["params"])
    x = np.asarray(X, np.float64)
    mean, var = x.mean((1, 2, 3), keepdims=True), x.var((1, 2, 3), keepdims=True)
    h = (x - mean) / np.sqrt(var + 1e-5) * p["ffn_norm"]["scale"] + p["ffn_norm"]["bias"]
    h = gelu(h @ p["ffn"]["expand"]["kernel"] + p["ffn"]["expand"]["bias"])
    x = x + h @ p["ffn"]["contract"]["kernel"] + p["ffn"]["contract"]["bias"]
    inner = {name: held[name]["local"] for name in held}
    expected = run(local, inner, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(run(block, held), expected, rtol=1e-4, atol=1e-4)


def test_next_vit_s_attention_block_keeps_what_attention_made_beside_what_convolution_made():
    block = NextTransformer(16, 12, pool=2, head_dim=4, ratio=1.0)
    held = drawn(block)
    zero = jax.tree.map(jnp.zeros_like, held["params"]["ffn"]["contract"])
    held["params"]["ffn"]["contract"] = zero
    y = run(block, held)
    assert y.shape == (*X.shape[:3], 16)
    # The convolution reads the attention's result: what it makes moves with it, and not the other way.
    held["params"]["projection"]["norm"]["bias"] += 1.0
    moved = run(block, held)
    np.testing.assert_allclose(moved[..., :12], y[..., :12], atol=1e-6)
    assert not np.allclose(moved[..., 12:], y[..., 12:])


def test_a_transition_that_changes_nothing_is_nothing():
    assert "transition" not in drawn(NextConv(8, head_dim=4))["params"]
    assert "transition" in drawn(NextConv(12, head_dim=4))["params"]
    assert "transition" in drawn(NextConv(8, 2, head_dim=4))["params"]
    with pytest.raises(UsageError, match="attention_dim=16 must leave some of dim=16"):
        NextTransformer(16, 16)


@pytest.mark.parametrize(
    "block",
    [
        MBConv(12, 2, squeeze=SqueezeExcite(hidden=3)),
        MBConv(fused=True, activation="hard_swish"),
        NextTransformer(16, 8, pool=2, head_dim=4),
    ],
)
def test_gradients_are_those_of_finite_differences(block):
    held = drawn(block)
    weights = jax.random.normal(jax.random.key(3), run(block, held).shape)

    @jax.jit
    def loss(params):
        return jnp.sum(weights * block.apply({**held, "params": params}, X, RATE, Context())[0])

    params = held["params"]
    gradient = jax.jit(jax.grad(loss))(params)
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient)))
    ahead, behind = (
        loss(jax.tree.map(lambda p, g, s=sign: p + s * 1e-2 * g / norm, params, gradient)) for sign in (1, -1)
    )
    np.testing.assert_allclose((ahead - behind) / 2e-2, norm, rtol=2e-2)


# Counted by the authors' own test: deeplab2, model/pixel_encoder/moat_test.py.
OFFICIAL = {
    "moat0": 27_846_892,
    "moat1": 41_598_448,
    "moat2-384": 73_422_408,
    "moat3-512": 189_958_040,
    "moat4-512": 483_214_184,
    "tiny0-256": 3_355_348,
    "tiny1-256": 5_122_895,
    "tiny2-256": 9_772_741,
    "tiny3-256": 19_534_390,
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", OFFICIAL)
def test_moat_has_as_many_parameters_as_the_authors_count(variant):
    config = importlib.import_module("configs.vision.moat").get_config(variant)
    side = int(variant.partition("-")[2] or 224)
    model = resolve(config).model
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == OFFICIAL[variant]


def test_a_stage_of_next_vit_repeats_its_period():
    model = resolve(importlib.import_module("configs.vision.nextvit").get_config("small")).model
    third = model.stages[2]
    kinds = [third.first, *(third.blocks[i % 5] for i in range(third.depth - 1))]
    widths = [block.dim for block in kinds]
    assert widths == [384, 384, 384, 384, 512] * 2
    assert [isinstance(block, NextTransformer) for block in kinds] == ([False] * 4 + [True]) * 2
