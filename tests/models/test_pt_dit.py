"""PT-DiT against its published code, its limits, and what it refuses."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from configs.diffusion import dit, pt_dit
from effjax import models
from effjax.config import build_kind
from effjax.errors import UsageError
from effjax.ffn.mlp import MLP
from effjax.matching import named_leaves
from effjax.measure import count
from effjax.mixers import volumes
from effjax.models.blocks.adaln import Layer
from effjax.models.blocks.proxy import ProxyBlock, Told
from effjax.models.pt_dit import PTDiT

FIXTURE = Path(__file__).parent / "fixtures" / "pt_dit.npz"


def block(**changes):
    return ProxyBlock(**{"heads": 2, "ffn": MLP(activation="gelu_tanh"), "window": (2, 2, 2), **changes})


def tiny(depth=2, **changes):
    told = {} if "classes" in changes else {"text": 6}
    fields = {"patch": 2, "dim": 16, "depth": depth, "block": block(), "frequencies": 8, **told}
    return PTDiT(**{**fields, **changes})


def video(seed=5):
    draw = np.random.default_rng(seed)
    x, text = draw.normal(size=(2, 4, 8, 8, 2)), draw.normal(size=(2, 5, 6))
    return tuple(jnp.asarray(a, jnp.float32) for a in (x, np.array([17.0, 803.0]), text))


@functools.cache
def randomised(model, *shapes):
    """Variables without zeros, so that every path counts."""
    inputs = video() if not shapes else [jnp.zeros(shape, dtype) for shape, dtype in shapes]
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs))
    draw = np.random.default_rng(9)
    return jax.tree.map(lambda s: jnp.asarray(0.3 * draw.normal(size=s.shape), s.dtype), shapes)


def run(model, variables, *inputs, **options):
    return jax.jit(lambda variables, *inputs: model.apply(variables, *inputs, **options))(variables, *inputs)


# Where a tensor of theirs lies here.
BLOCK = {
    "proxy_attn1": "proxy/among",
    "pvisual_attn2": "proxy/inject",
    "linear_1_visual": "proxy/project",
    "attn1": "local",
    "attn3": "shifted",
    "linear_2": "shifted_project",
    "attn2": "text",
    "ff.net.0.proj": "ffn/expand",
    "ff.net.2": "ffn/contract",
}
ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "output"}
OUTSIDE = {
    "pos_embed.proj": "embed/projection",
    "adaln_single.emb.timestep_embedder.linear_1": "time_embed/expand",
    "adaln_single.emb.timestep_embedder.linear_2": "time_embed/contract",
    "adaln_single.linear": "steer",
    "caption_projection.linear_1": "text_expand",
    "caption_projection.linear_2": "text_contract",
    "proj_out": "output",
}
LEAF = {"weight": "kernel", "bias": "bias"}


def ours(name):
    """Path and layer here of one of their tensors."""
    if name == "scale_shift_table":
        return "table", None
    head, _, leaf = name.rpartition(".")
    match = re.fullmatch(r"transformer_blocks\.(\d)(?:\.(.*))?", head)
    if match is None:
        return f"{OUTSIDE[head]}/{LEAF[leaf]}", None
    layer, inside = int(match[1]), match[2]
    if inside is None:
        return {"scale_shift_table": "blocks/table", "proxy_scale_shift_table": "blocks/shifted_table"}[
            leaf
        ], layer
    module, _, part = inside.partition(".to_")
    attention = f"/{ATTENTION[f'to_{part}']}" if part else ""
    return f"blocks/{BLOCK[module]}{attention}/{LEAF[leaf]}", layer


def laid_out(array, path, shape):
    """Their `[out, in]`, or `[out, in, p, q]` of the patches, in our layout."""
    if array.ndim == 4:
        array = array.transpose(2, 3, 1, 0)
    elif not path.endswith("table"):
        array = array.T
    return array.reshape(shape)


def published():
    """Their weights as our variables, every one of which is set once; their inputs and predictions."""
    with np.load(FIXTURE) as data:
        arrays = dict(data)
    model = tiny(frequencies=256)
    inputs = [jnp.asarray(arrays[name]) for name in ("x", "t", "text")]
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs))
    variables = jax.tree.map(lambda leaf: np.full(leaf.shape, np.nan, np.float32), shapes)
    leaves = {path.split("/", 1)[1]: leaf for path, leaf in named_leaves(variables).items()}
    for key, array in arrays.items():
        if key.startswith("weight/"):
            path, layer = ours(key.removeprefix("weight/"))
            target = leaves[path] if layer is None else leaves[path][layer]
            assert np.isnan(target).all(), path
            target[...] = laid_out(array, path, target.shape)
    assert not any(np.isnan(leaf).any() for leaf in leaves.values())
    return model, variables, inputs, arrays["prediction"]


def test_predictions_are_those_of_the_published_code():
    model, variables, inputs, prediction = published()
    got = np.asarray(run(model, variables, *inputs))
    assert np.abs(got - prediction).max() / np.abs(prediction).max() < 1e-5


def test_it_predicts_zero_and_the_new_branches_do_nothing_at_first():
    model = tiny()
    variables = meta.unbox(jax.jit(model.init)(jax.random.key(0), *video()))
    np.testing.assert_array_equal(run(model, variables, *video()), 0.0)
    params = variables["params"]["blocks"]
    for name in (("proxy", "project"), ("shifted_project",), ("text", "output")):
        leaf = functools.reduce(lambda tree, key: tree[key], name, params)
        assert not np.any(leaf["kernel"])
        assert not np.any(leaf["bias"])
    assert np.std(params["table"]) == pytest.approx(16**-0.5, rel=0.3)


def test_a_picture_is_a_video_of_one_frame():
    model = tiny(depth=1, learned_sigma=False)
    x, t, text = video()
    variables = randomised(model)
    got = run(model, variables, x[:, 0], t, text)
    assert got.shape == (2, 8, 8, 2)
    np.testing.assert_allclose(got, run(model, variables, x[:, :1], t, text)[:, 0], atol=1e-5)


def test_zeros_are_no_words_and_no_words_say_nothing():
    model = tiny(depth=1)
    x, t, text = video()
    variables = randomised(model)
    short = text.at[:, 3:].set(0.0)
    np.testing.assert_allclose(
        run(model, variables, x, t, short), run(model, variables, x, t, short[:, :3]), atol=1e-4
    )
    nothing = model.null(text)
    np.testing.assert_array_equal(nothing, jnp.zeros_like(text))
    silent = run(model, variables, x, t, nothing)
    assert np.isfinite(silent).all()
    np.testing.assert_allclose(silent, run(model, variables, x, t, nothing[:, :1]), atol=1e-4)
    assert np.abs(silent - run(model, variables, x, t, short)).max() > 1e-3


def test_told_a_class_it_reads_no_text():
    model = tiny(depth=1, classes=3)
    x, t, _ = video()
    told = ((2, 4, 8, 8, 2), jnp.float32), ((2,), jnp.float32), ((2,), jnp.int32)
    variables = randomised(model, *told)
    label = jnp.array([0, 1])
    assert not any("text" in path for path in named_leaves(variables))
    np.testing.assert_array_equal(model.null(label), [3, 3])
    one, other, none = (run(model, variables, x, t, c) for c in (label, label[::-1], model.null(label)))
    assert np.abs(one - other).max() > 1e-3
    assert np.abs(one - none).max() > 1e-3


def test_local_attention_sees_its_window_and_shifted_attention_those_beside_it():
    """What a token changes, by brute force: both attentions one after the other, and nothing else."""
    grid, window = (2, 6, 4), (1, 2, 2)
    quiet = block(window=window)
    told = Told(jnp.zeros((1, 6, 8)), None, None, grid)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 48, 8)), jnp.float32)
    variables = randomised_block(quiet, x, told)
    params = variables["params"]
    for name in ("proxy", "ffn"):
        params[name] = jax.tree.map(jnp.zeros_like, params[name])
    where = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1)[None]
    where = volumes.partition(where, window).reshape(-1, 3)  # of each token, window by window
    apply = jax.jit(lambda x: quiet.apply(variables, x, Layer(), told)[0][0])
    before, other = apply(x), jnp.arange(8.0)
    changes = [np.abs(apply(x.at[0, token].set(other)) - before).max(-1) for token in range(48)]
    touched = np.stack(changes, axis=1) > 1e-6  # [token, by which]

    def beside(shift):
        cell = (where - shift) // np.array(window)
        return (cell[:, None] == cell[None]).all(-1)

    local, shifted = beside(np.zeros(3, int)), beside(np.array([0, 1, 1]))
    np.testing.assert_array_equal(touched, shifted.astype(int) @ local.astype(int) > 0)


def randomised_block(module, x, told):
    shapes = meta.unbox(jax.eval_shape(module.init, jax.random.key(0), x, Layer(), told))
    draw = np.random.default_rng(1)
    return jax.tree.map(lambda s: jnp.asarray(0.3 * draw.normal(size=s.shape), s.dtype), shapes)


def test_gradient_of_a_block_is_the_slope():
    """Through a draw with a given key, which is the same on both sides."""
    module, grid = block(window=(1, 2, 2), choice="random"), (2, 4, 4)
    x, direction = (jnp.asarray(a, jnp.float32) for a in np.random.default_rng(2).normal(size=(2, 1, 32, 8)))
    told = Told(0.3 * jnp.ones((1, 6, 8)), None, None, grid)
    variables = randomised_block(module, x, told)

    @jax.jit
    def value(x):
        key = {"dropout": jax.random.key(4)}
        return jnp.sum(jnp.sin(module.apply(variables, x, Layer(), told, train=True, rngs=key)[0]))

    step = 3e-3
    slope = (value(x + step * direction) - value(x - step * direction)) / (2 * step)
    assert float(jnp.vdot(jax.grad(value)(x), direction)) == pytest.approx(float(slope), rel=1e-2)


@pytest.mark.slow
def test_random_proxies_are_drawn_anew_in_training_and_never_after():
    model = tiny(block=block(choice="random"))
    variables, inputs = randomised(tiny()), video()

    def trained(key):
        return run(model, variables, *inputs, train=True, rngs={"dropout": jax.random.key(key)})

    assert np.abs(trained(0) - trained(1)).max() > 1e-3
    first = tiny(block=block(choice="first"))
    np.testing.assert_array_equal(run(model, variables, *inputs), run(first, variables, *inputs))


@pytest.mark.slow
def test_in_pieces_it_is_the_same_and_what_is_kept_is_given_again():
    model, inputs = tiny(), video()
    variables = randomised(model)

    @jax.jit
    def pieces(variables):
        bound = model.bind(variables)
        stream = bound.layers(bound.layers(bound.begin(*inputs), (0, 1)), (1, 2))
        start = bound.begin(*inputs)
        shape = (model.depth, model.branches, *start.x.shape)
        fresh = jnp.ones(shape[:2], bool)
        all_fresh, kept = bound.recall(start, fresh, jnp.zeros(shape))
        again, _ = bound.recall(start, ~fresh, kept)
        nothing, _ = bound.recall(start, ~fresh, jnp.zeros(shape))
        return [bound.finish(s) for s in (stream, all_fresh, again, nothing)]

    whole = run(model, variables, *inputs)
    in_two, all_fresh, again, nothing = pieces(variables)
    for got in (in_two, all_fresh, again):
        np.testing.assert_allclose(got, whole, atol=2e-4)
    assert np.abs(nothing - whole).max() > 1e-2


@pytest.mark.slow
def test_half_precision_is_near():
    model, inputs = tiny(), video()
    variables = randomised(model)
    small = jax.tree.map(lambda a: 0.3 * a, variables)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (small, inputs))
    got, want = run(model, half[0], *half[1]), run(model, small, *inputs)
    assert got.dtype == jnp.bfloat16
    assert np.abs(got.astype(jnp.float32) - want).max() < 0.05 * np.abs(want).max()


@pytest.mark.parametrize(
    ("side", "window", "share"), [(32, (1, 2, 2), 0.344), (64, (1, 4, 4), 0.098), (128, (1, 8, 8), 0.047)]
)
def test_products_of_queries_and_keys_are_the_paper_s_share_of_all(side, window, share):
    """1 / m^2 + 1 / m + 2 m / N, with windows of m tokens (section 3.3), at 256, 512 and 1024 pixels."""
    model = PTDiT(patch=2, dim=32, depth=3, block=block(window=window), classes=3)
    shapes = [((1, side, side, 4), jnp.float32), ((1,), jnp.float32), ((1,), jnp.int32)]
    inputs = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    params = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs))["params"]
    cost = count(lambda params, *inputs: model.apply({"params": params}, *inputs), params, *inputs)
    n, m = (side // 2) ** 2, window[1] * window[2]
    all_of_all = model.depth * 2 * n**2 * model.dim
    got = cost.work_by_kind["attention"].macs / all_of_all
    assert got == pytest.approx(1 / m**2 + 1 / m + 2 * m / n, rel=1e-9)
    assert got == pytest.approx(share, abs=5e-4)


def macs_of(section, side, condition):
    model = build_kind(models.KINDS, section, "config.model")
    inputs = jax.ShapeDtypeStruct((1, side, side, 4), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
    inputs = (*inputs, condition)
    params = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs))["params"]
    return count(lambda params, *inputs: model.apply({"params": params}, *inputs), params, *inputs).macs


def test_what_a_published_size_costs():
    """In closed form: L at 512 pixels, told 120 words."""
    d, depth, n, proxies, words = 864, 28, 1024, 64, 120
    tokens = (
        4 + 5 + 3 + 2 + 8
    )  # windows, shifted ones, to proxies, to words, FFN: matrices that a token meets
    attention = 2 * (proxies**2 + n * proxies + 2 * n * n // proxies + n * words) * d
    layer = (tokens * n + 6 * proxies + 2 * words) * d**2 + attention
    outside = words * (4096 * d + d**2) + n * (16 + 32) * d + 256 * d + 7 * d**2
    section, text = pt_dit.model("l", (1, 4, 4), text=4096), jax.ShapeDtypeStruct((1, 120, 4096), jnp.float32)
    assert macs_of(section, 64, text) == depth * layer + outside


@pytest.mark.parametrize(
    ("side", "saved"),
    [
        (32, -0.191),
        (128, 0.366),
        pytest.param(64, 0.021, marks=pytest.mark.slow),
        pytest.param(256, 0.723, marks=pytest.mark.slow),
    ],
)
def test_against_dit_it_saves_from_512_pixels_on(side, saved):
    """B told a class, against DiT-B, whose attention grows with the square of the tokens."""
    label, window = jax.ShapeDtypeStruct((1,), jnp.int32), (1, side // 16, side // 16)
    ours = macs_of(pt_dit.model("b", window, classes=1000), side, label)
    theirs = macs_of(dit.model("b2", learned_sigma=True), side, label)
    assert 1 - ours / theirs == pytest.approx(saved, abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "shapes", "message"),
    [
        ({}, ((1, 3, 8, 8, 2), (1, 5, 6)), r"windows of 2 x 2 x 2 .* do not tile 3 x 4 x 4 tokens: choose"),
        ({}, ((1, 4, 6, 8, 2), (1, 5, 6)), r"windows of 2 x 2 x 2 .* do not tile 4 x 3 x 4 tokens"),
        ({}, ((1, 4, 7, 8, 2), (1, 5, 6)), r"a picture of 7 x 8 cannot be cut into patches"),
        (
            {},
            ((1, 4, 8, 8, 2), (1, 5, 7)),
            r"has shape \(1, 5, 7\), and this model is told features of texts",
        ),
        ({}, ((1, 4, 8, 8, 2), (1,)), r"is told features of texts \[B, L, 6\]"),
        ({"classes": 3}, ((1, 4, 8, 8, 2), (1, 5, 6)), r"is told labels \[B\]"),
        ({}, ((1, 8, 2), (1, 5, 6)), r"content of shape \(1, 8, 2\): give pictures"),
    ],
)
def test_refuses(changes, shapes, message):
    inputs = jnp.zeros(shapes[0]), jnp.zeros(1), jnp.zeros(shapes[1])
    with pytest.raises(UsageError, match=message):
        jax.eval_shape(tiny(**changes).init, jax.random.key(0), *inputs)


def test_refuses_to_be_told_both_or_neither():
    for told in ({"text": 6, "classes": 3}, {"text": 0, "classes": 0}):
        with pytest.raises(UsageError, match=r"give the channels of a text's features, or a number"):
            tiny(**told)
    with pytest.raises(UsageError, match=r"dim=24: .* need a multiple of 16"):
        tiny(dim=24)
