"""Semantic tokens in windows and dumbbells, against the published network and against loops."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from configs.vision.stvit import windowed
from effjax import models
from effjax.config import build_kind
from effjax.errors import UsageError
from effjax.ffn import MLP
from effjax.measure.cost import count
from effjax.mixers import Attention, ShiftedWindow
from effjax.mixers.context import Context
from effjax.models.blocks.dumbbell import Dumbbell, SemanticWindows, in_windows, squares
from effjax.models.blocks.metaformer import Block
from effjax.models.pyramid import Stage
from effjax.tokens.semantic import CrossLayer
from tests.models import official

RATES = jnp.zeros(5)
X = jax.random.normal(jax.random.key(2), (2, 6, 4, 8))
LAYER = (("weight", "kernel", "o i -> i o"), ("bias", "bias", ""))
NORM = (("weight", "scale", ""), ("bias", "bias", ""))
BATCH_NORM = (("running_mean", "mean", ""), ("running_var", "var", ""))


@pytest.fixture(scope="module")
def recorded():
    """The published network of width 4 with two dumbbells; its layers of one kind have one name."""
    with np.load(official.FOLDER / "stvit_swin.npz") as data:
        tensors = {
            re.sub(
                r"layers\.2\.blocks\.(\d+)",
                lambda match: f"layers.2.kind{int(match[1]) % 6}.{int(match[1]) // 6}",
                name,
            ): data[name].astype(np.float32)
            for name in data.files
        }
    made = {name: tensors.pop(f"__{name}") for name in ("logits", "semantic", "recovered")}
    return tensors, made


def rows_of(theirs, ours, leaves):
    return [(f"{theirs}.{a}", f"{ours}/{b}", layout) for a, b, layout in leaves]


def layer_rows(theirs, ours, scaled=True, mixer=""):
    """A transformer layer of theirs; `mixer` is where ours has its projections."""
    rows = rows_of(f"{theirs}.norm1", f"{ours}/mixer_norm", NORM)
    rows += rows_of(f"{theirs}.norm2", f"{ours}/ffn_norm", NORM)
    rows += rows_of(f"{theirs}.mlp.fc1", f"{ours}/ffn/expand", LAYER)
    rows += rows_of(f"{theirs}.mlp.fc2", f"{ours}/ffn/contract", LAYER)
    fused = (
        {"attn.q": ("query",), "attn.kv": ("key", "value")}
        if scaled
        else {"attn.qkv": ("query", "key", "value")}
    )
    for name, parts in fused.items():
        for leaf, to, layout in (("weight", "kernel", "(h d) i -> i h d"), ("bias", "bias", "(h d) -> h d")):
            rows.append((f"{theirs}.{name}.{leaf}", tuple(f"{ours}/{mixer}{p}/{to}" for p in parts), layout))
    rows.append((f"{theirs}.attn.proj.weight", f"{ours}/{mixer}output/kernel", "o (h d) -> h d o"))
    rows.append((f"{theirs}.attn.proj.bias", f"{ours}/{mixer}output/bias", ""))
    if scaled:
        return rows + [
            (f"{theirs}.layer_scale_{i}", f"{ours}/{n}_scale", "") for i, n in ((1, "mixer"), (2, "ffn"))
        ]
    table = (f"{theirs}.attn.relative_position_bias_table", f"{ours}/{mixer}bias/table", "")
    return [*rows, table]


def dumbbell_rows(ours, layer="{}"):
    """One of them, or all as one stack."""
    places = {
        1: (f"{ours}/generate/first", ""),
        2: (f"{ours}/generate/second", ""),
        3: (f"{ours}/process_0", "mixer/"),
        4: (f"{ours}/process_1", "mixer/"),
        5: (f"{ours}/recover", ""),
    }
    return [
        row
        for kind, (path, mixer) in places.items()
        for row in layer_rows(f"layers.2.kind{kind}.{layer}", path, mixer=mixer)
    ]


def network_rows():
    rows = []
    for i, conv in ((0, "layers_0"), (2, "layers_1")):
        kernel = (f"patch_embed.proj.{i}.c.weight", f"params/stem/{conv}/conv/kernel", "o i u v -> u v i o")
        norm = f"patch_embed.proj.{i}.bn"
        rows += [kernel, *rows_of(norm, f"params/stem/{conv}/norm", NORM)]
        rows += rows_of(norm, f"batch_stats/stem/{conv}/norm", BATCH_NORM)
    for s in (0, 1, 3):
        rows += layer_rows(f"layers.{s}.blocks.{{}}", f"params/stages_{s}/rest_0", False, "mixer/")
    rows += layer_rows("layers.2.kind0.{}", "params/stages_2/stack/members_0", False, "mixer/")
    rows += dumbbell_rows("params/stages_2/stack/members_1")
    for s in (1, 2, 3):
        rows += rows_of(f"layers.{s - 1}.downsample.norm", f"params/stages_{s}/downsample/norm", NORM)
        rows += rows_of(
            f"layers.{s - 1}.downsample.reduction", f"params/stages_{s}/downsample/reduction", LAYER[:1]
        )
    return [
        *rows,
        *rows_of("norm", "params/head/norm", NORM),
        *rows_of("head", "params/head/classifier", LAYER),
    ]


@pytest.mark.slow
def test_the_network_is_the_published_one(recorded):
    tensors, made = recorded
    size = dict(window=7, side=3, reach=10, head_dim=4)
    section = windowed(4, (1, 1, 12, 1), **size, recover=True, classes=5, drop_path=0.0)
    model = build_kind(models.KINDS, section, "model")
    pictures = jnp.asarray(np.random.RandomState(1).standard_normal((2, 224, 224, 3)), jnp.float32)
    official.check(model, official.translated(tensors, network_rows(), d=4), pictures, made["logits"])


def dumbbell(window, side, reach, heads, **more):
    """As the published network has it."""
    process = (ShiftedWindow(heads, side, bias=None), Attention(heads))
    return Dumbbell(
        SemanticWindows(heads, window, side, reach, **more),
        tuple(Block(mixer=mixer, ffn=MLP(), epsilon=1e-5, layer_scale=1e-5) for mixer in process),
    )


def halves(block, params, x):
    """The semantic tokens as they are generated, and what the whole dumbbell returns."""
    s, _ = block.generate.apply({"params": params["generate"]}, x, RATES[:2], Context())
    return s, block.apply({"params": params}, x, RATES, Context())[0]


def test_the_dumbbell_is_the_published_one(recorded):
    tensors, made = recorded
    own = {n: w for n, w in tensors.items() if re.match(r"layers\.2\.kind[1-5]\.0\.", n)}
    params = official.translated(own, dumbbell_rows("", "0"), d=4)[""]
    x = jnp.asarray(np.random.RandomState(2).standard_normal((2, 14, 14, 16)), jnp.float32)
    block = dumbbell(7, 3, 10, heads=4)

    semantic, recovered = jax.jit(functools.partial(halves, block))(params, x)
    for ours, theirs in (
        (semantic.reshape(2, 36, 16), made["semantic"]),
        (recovered[:1].reshape(1, 196, 16), made["recovered"]),
    ):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def drawn(block, x, rates):
    """All parameters at random."""
    shapes = meta.unbox(jax.eval_shape(block.init, jax.random.key(0), x, rates, Context()))
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(0.3 * draw.standard_normal(s.shape), s.dtype), shapes)


@pytest.mark.parametrize(
    ("count", "reach", "starts"),
    [
        ((2, 1), 10, ([0, 4], [0])),  # 14 x 7 places: the published squares; a map smaller than a square
        ((2, 1), 4, ([1, 8], [1])),
        ((5, 1), 4, ([0, 2, 5, 7, 10], [1])),
    ],
)
def test_squares_stand_around_their_windows_and_inside_the_map(count, reach, starts):
    places = np.stack(np.meshgrid(np.arange(14), np.arange(7), indexing="ij"), axis=-1)[None]
    found = squares(jnp.asarray(places, jnp.float32), count, reach)
    for w, (i, j) in enumerate(np.ndindex(*count)):
        corner = starts[0][i], starts[1][j]
        rows, columns = (slice(at, min(at + reach, n)) for at, n in zip(corner, (14, 7), strict=True))
        np.testing.assert_array_equal(found[0, w], places[0, rows, columns].reshape(-1, 2))


def test_a_window_sees_its_own_semantic_tokens_and_its_square():
    draw = np.random.RandomState(0)
    (rows, columns), count, side, reach = (6, 4), (2, 2), 2, 4
    m, n = count[0] * count[1] * side**2, rows * columns
    q, k, v = (draw.standard_normal((2, size, 2, 3)).astype(np.float32) for size in (m, m + n, m + n))
    y, _ = jax.jit(functools.partial(in_windows, grid=(rows, columns), count=count, side=side, reach=reach))(
        q, k, v
    )
    for at, (i, j) in enumerate(np.ndindex(4, 4)):
        window = i // 2, j // 2
        own = [a * 4 + b for a in range(4) for b in range(4) if (a // 2, b // 2) == window]
        top = 0 if window[0] == 0 else 2  # 3 x 2 places a window: 1.5 - 2 and 4.5 - 2; all four columns
        near = [m + a * columns + b for a in range(top, top + 4) for b in range(4)]
        keys, values = (np.float64(t[:, own + near]) for t in (k, v))
        weights = np.exp(np.einsum("bhd,bshd->bhs", np.float64(q[:, at]), keys) / np.sqrt(3))
        weights /= weights.sum(-1, keepdims=True)
        np.testing.assert_allclose(
            y[:, at], np.einsum("bhs,bshd->bhd", weights, values), rtol=1e-5, atol=1e-6
        )


def test_silent_layers_leave_pooled_tokens_and_the_image_as_it_was():
    block = dumbbell(3, 2, 4, heads=2, layer_scale=0.0, shortcut=True)
    params = drawn(block, X, RATES)["params"]
    for layer in (params["generate"]["first"], params["generate"]["second"], params["recover"]):
        layer |= dict(mixer_scale=jnp.zeros(8), ffn_scale=jnp.zeros(8))
    pooled, y = jax.jit(functools.partial(halves, block))(params, X)
    # Two windows of three rows, of which the middle one is in both halves; two windows of two columns.
    expected = [[X[:, a : a + 2, c].max(1) for c in range(4)] for a in (0, 1, 3, 4)]
    np.testing.assert_array_equal(pooled, np.moveaxis(np.asarray(expected), 2, 0))
    np.testing.assert_array_equal(y, X)


def test_maps_that_windows_do_not_tile_are_divided_evenly():
    x = jnp.ones((1, 9, 16, 8))
    block = dumbbell(7, 3, 10, heads=2)
    made = jax.eval_shape(
        lambda x: block.generate.init_with_output(jax.random.key(0), x, RATES[:2], Context())[0][0], x
    )
    assert made.shape == (1, 6, 9, 8)
    assert (
        jax.eval_shape(
            lambda x: block.init_with_output(jax.random.key(0), x, RATES, Context())[0][0], x
        ).shape
        == x.shape
    )


def test_the_first_layer_without_its_shortcut_is_never_dropped():
    layer = CrossLayer(heads=2, shortcut=False)
    q, x = X.reshape(2, 24, 8)[:, :4], X.reshape(2, 24, 8)
    params = meta.unbox(jax.jit(layer.init)(jax.random.key(0), q, x))["params"]
    run = jax.jit(
        lambda params, rate: layer.apply(
            {"params": params}, q, x, rate, True, rngs={"dropout": jax.random.key(1)}
        )[0]
    )
    dropped = run(params, 0.9999)
    silent = jax.tree.map(jnp.zeros_like, params["ffn"])
    np.testing.assert_allclose(dropped, run(params | dict(ffn=silent), 0.0), rtol=1e-6)
    assert np.abs(dropped).max() > 0.01


@pytest.mark.slow
def test_gradients_reach_everything_and_are_those_of_finite_differences():
    block = dumbbell(3, 2, 4, heads=2)
    params = drawn(block, X, RATES)
    target = jax.random.normal(jax.random.key(4), X.shape)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        return jnp.mean((block.apply(params, X, RATES, Context())[0] - target) ** 2)

    _, gradient = loss(params)
    assert all(bool(jnp.any(leaf)) for leaf in jax.tree.leaves(gradient))
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient)))
    step = 1e-2 / norm
    ahead, behind = (
        loss(jax.tree.map(lambda p, g, s=s: p + s * step * g / norm, params, gradient))[0] for s in (1, -1)
    )
    np.testing.assert_allclose((ahead - behind) / (2 * step), norm, rtol=2e-2)


def test_macs_are_those_of_the_formula():
    block = dumbbell(3, 2, 4, heads=2)
    params = drawn(block, X, RATES)
    c, n, m = 8, 24, 16
    seen = 4 + 4 * 4  # of a window: its own, and the square
    mlp = 8 * c * c
    first = m * (2 * c * c + mlp) + (m + n) * 2 * c * c + 2 * m * seen * c
    second = m * (2 * c * c + mlp) + (m + n) * 2 * c * c + 2 * m * (m + n) * c
    process = 2 * m * (4 * c * c + mlp) + 2 * m * 4 * c + 2 * m * m * c
    recover = n * (2 * c * c + mlp) + m * 2 * c * c + 2 * n * m * c
    found = count(lambda p, x: block.apply(p, x, RATES, Context())[0], params, X[:1]).macs
    assert found == first + second + process + recover


class Rates(nn.Module):
    """Writes its drop rates into the first channels."""

    layers: int

    def __call__(self, x, drop_rates, context, train=False):
        told = jnp.zeros(8).at[: self.layers].set(jnp.atleast_1d(drop_rates))
        return x * 10 + told[None, None, None], None


def test_a_block_of_several_layers_counts_for_as_many_and_gets_their_rates():
    stage = Stage(depth=9, dim=8, first=Rates(2), blocks=(Rates(1), Rates(2)))
    rates = jnp.arange(1.0, 10.0)
    y, _ = stage.init_with_output(jax.random.key(0), jnp.zeros((1, 1, 1, 8)), rates)
    # Two, then one and two, one and two behind each other, and one more: each later block takes a digit.
    np.testing.assert_allclose(y[0, 0, 0, :2], [134679, 205080])


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (dumbbell(3, 4, 4, heads=2), "6 x 4 tokens has no 8 x 8 windows"),
        (dumbbell(3, 2, 4, heads=3), "heads=3 does not divide the width 8"),
    ],
)
def test_windows_that_cannot_be(block, message):
    with pytest.raises(UsageError, match=message):
        jax.eval_shape(block.init, jax.random.key(0), X, RATES, Context())


def test_a_stage_must_end_with_a_whole_block():
    with pytest.raises(UsageError, match="depth=8 and 2 kinds of blocks make no stage of whole blocks"):
        Stage(depth=8, dim=8, blocks=(Rates(1), Rates(5)))
    with pytest.raises(UsageError, match="make no stage"):
        Stage(depth=1, dim=8, first=Rates(2))
