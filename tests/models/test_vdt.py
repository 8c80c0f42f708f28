"""VDT against its published code and sizes, and what its factorised attention is."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from configs.diffusion.vdt import get_config
from effjax import models
from effjax.config import build_kind
from effjax.diffusion.caches import ConfidenceTaylor
from effjax.diffusion.caches.blockwise import everything
from effjax.diffusion.ddpm import DDPM
from effjax.diffusion.examples import example_keys
from effjax.diffusion.generate import Sampling, sample_classes
from effjax.diffusion.samplers import DDIMSampler
from effjax.errors import UsageError
from effjax.ffn.mlp import MLP
from effjax.matching import named_leaves
from effjax.measure.cost import count
from effjax.mixers.attention import Attention
from effjax.mixers.context import Context
from effjax.models.blocks.adaln import DiTBlock, Layer
from effjax.models.blocks.video import SpatioTemporalBlock
from effjax.models.vdt import VDT
from effjax.train.tasks.diffusion import Diffusion
from tests.models import official

SHAPE = (3, 4, 4, 2)


def tiny(**changes):
    block = SpatioTemporalBlock(
        temporal=Attention(heads=2), mixer=Attention(heads=2), ffn=MLP(activation="gelu_tanh")
    )
    fields = dict(block=block, patch=2, dim=8, depth=2, frames=3, classes=3, frequencies=6)
    return VDT(**{**fields, **changes})


def inputs(batch=2, shape=SHAPE):
    x = np.random.default_rng(5).normal(size=(batch, *shape)).astype(np.float32)
    return jnp.asarray(x), jnp.linspace(1.0, 900.0, batch), jnp.arange(batch) % 3


def randomised(model, *args):
    """Parameters with no zeros, so that every path counts."""
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), *(args or inputs())))
    draw = np.random.default_rng(9)
    return jax.tree.map(lambda s: jnp.asarray(0.3 * draw.normal(size=s.shape), s.dtype), shapes)


def shapes_of(variant):
    model = build_kind(models.KINDS, get_config(variant).model, "config.model")
    videos = jnp.zeros((1, 16, 32, 32, 4))
    return model, meta.unbox(
        jax.eval_shape(model.init, jax.random.key(0), videos, jnp.zeros(1), jnp.zeros(1, int))
    )


# What the published code counts without its position tables, and the 1,000 labels that it never reads.
PUBLISHED = {"s2": (41_744_672, 28.5e6), "l2": (860_855_072, 595.9e6)}


@pytest.mark.parametrize("variant", PUBLISHED)
def test_parameters_are_those_of_the_published_code_and_the_paper_counts_attention_and_ffn(variant):
    model, shapes = shapes_of(variant)
    published, in_the_paper = PUBLISHED[variant]
    leaves = {path: math.prod(leaf.shape) for path, leaf in named_leaves(shapes["params"]).items()}
    assert sum(leaves.values()) == published - 1000 * model.dim
    inside = ("blocks/temporal/", "blocks/mixer/", "blocks/ffn/")
    matrices = sum(n for path, n in leaves.items() if path.startswith(inside) and path.endswith("kernel"))
    assert matrices == 16 * model.dim**2 * model.depth
    # The table has them and one square matrix more, to its last digit.
    assert matrices + model.dim**2 == pytest.approx(in_the_paper, abs=0.06e6)
    modulation = sum(n for path, n in leaves.items() if path.startswith("blocks/modulation/"))
    assert modulation == 6 * model.depth * (model.dim**2 + model.dim)  # a block has its own


@pytest.mark.parametrize("variant", ["scenes", "s2"])
def test_macs_are_those_of_attention_in_parts(variant):
    model = build_kind(models.KINDS, get_config(variant).model, "config.model")
    side, channels = (16, 3) if variant == "scenes" else (32, 4)
    frames, places, dim = model.frames, (side // model.patch) ** 2, model.dim
    array = jax.ShapeDtypeStruct
    args = (
        array((1, frames, side, side, channels), jnp.float32),
        array((1,), jnp.float32),
        array((1,), jnp.int32),
    )
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), *args))
    cost = count(lambda params, *args: model.apply({"params": params}, *args), shapes["params"], *args)
    tokens, out = frames * places, channels * (1 + model.learned_sigma)
    matrices = tokens * 17 * dim**2 + 6 * dim**2  # two attentions, a projection, the FFN; the modulation
    attention = 2 * tokens * (frames + places) * dim  # joint attention has frames * places here
    outside = tokens * model.patch**2 * (channels + out) * dim + (model.frequencies + 3 * dim) * dim
    assert cost.macs == model.depth * (matrices + attention) + outside


def test_parity_with_the_published_code():
    """A toy of RERV/VDT's `models.py` at cdbad2b with weights drawn at random, in PyTorch."""
    with np.load(official.FOLDER / "vdt.npz") as data:
        tensors = dict(data)
    videos, t, expected = (tensors.pop(name) for name in ("__input", "__time", "__output"))
    linear, heads, joined = "o i -> i o", "(h d) i -> i h d", "o (h d) -> h d o"

    def attention(theirs, ours):
        parts = ("query", "key", "value")
        return [
            (f"blocks.{{}}.{theirs}.qkv.weight", tuple(f"blocks/{ours}/{p}/kernel" for p in parts), heads),
            (
                f"blocks.{{}}.{theirs}.qkv.bias",
                tuple(f"blocks/{ours}/{p}/bias" for p in parts),
                "(h d) -> h d",
            ),
            (f"blocks.{{}}.{theirs}.proj.weight", f"blocks/{ours}/output/kernel", joined),
            (f"blocks.{{}}.{theirs}.proj.bias", f"blocks/{ours}/output/bias", None),
        ]

    def layer(theirs, ours, kernel=linear, bias=None):
        return [(f"{theirs}.weight", f"{ours}/kernel", kernel), (f"{theirs}.bias", f"{ours}/bias", bias)]

    def modulation(count):
        return dict(kernel=f"({count} o) i -> i {count} o", bias=f"({count} o) -> {count} o")

    rows = [
        *layer("x_embedder.proj", "embed/projection", "o i p q -> (p q i) o"),
        *layer("t_embedder.mlp.0", "time_embed/expand"),
        *layer("t_embedder.mlp.2", "time_embed/contract"),
        ("y_embedder.embedding_table.weight", "label_embed/embedding", None),
        *attention("attn", "mixer"),
        *attention("temporal_attn", "temporal"),
        *layer("blocks.{}.mlp.fc1", "blocks/ffn/expand"),
        *layer("blocks.{}.mlp.fc2", "blocks/ffn/contract"),
        *layer("blocks.{}.temporal_fc", "blocks/temporal_projection"),
        ("blocks.{}.temporal_norm1.weight", "blocks/temporal_norm/scale", None),
        ("blocks.{}.temporal_norm1.bias", "blocks/temporal_norm/bias", None),
        *layer("blocks.{}.adaLN_modulation.1", "blocks/modulation/projection", **modulation("six")),
        *layer("final_layer.linear", "output"),
        *layer("final_layer.adaLN_modulation.1", "modulation/projection", **modulation("two")),
    ]
    params = official.translated(tensors, rows, h=2, six=6, two=2)
    model = tiny(dim=16, classes=1, null_class=True, frequencies=256)
    wanted = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), videos, t, jnp.zeros(2, int)))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, wanted["params"])
    ours = jax.jit(model.apply)({"params": params}, videos, t, jnp.zeros(2, int))
    assert np.abs(np.asarray(ours) - expected).max() <= 1e-5 * np.abs(expected).max()


def block_inputs(frames=3, places=4, dim=8):
    draw = np.random.default_rng(3)
    return (
        jnp.asarray(draw.normal(size=(2, frames, places, dim)), jnp.float32),
        jnp.asarray(draw.normal(size=(2, dim)), jnp.float32),
    )


def block_params(x, c):
    block = tiny().block
    return block, randomised(block, x, Layer(), c, Context())["params"]


def test_a_frame_without_its_temporal_part_is_an_image_block():
    """Verify (b): F = 1, and the second projection at zero."""
    x, c = block_inputs(frames=1)
    block, params = block_params(x, c)
    got = jax.jit(block.apply)({"params": params}, x, Layer(), c, Context())[0]
    silent = {**params, "temporal_projection": jax.tree.map(jnp.zeros_like, params["temporal_projection"])}
    alone = jax.jit(block.apply)({"params": silent}, x, Layer(), c, Context())[0]
    image = DiTBlock(mixer=Attention(heads=2), ffn=MLP(activation="gelu_tanh"))
    own = {name: params[name] for name in ("mixer", "ffn", "modulation")}
    expected = jax.jit(image.apply)({"params": own}, x[:, 0], Layer(), c, Context())[0]
    np.testing.assert_allclose(alone[:, 0], expected, rtol=1e-5, atol=1e-6)
    assert np.max(np.abs(got - alone)) > 1e-2
    # Attention over one token gives its value.
    z, weights = np.asarray(x), jax.tree.map(np.asarray, params)
    h = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-5)
    h = h * weights["temporal_norm"]["scale"] + weights["temporal_norm"]["bias"]
    value, output = weights["temporal"]["value"], weights["temporal"]["output"]
    h = np.einsum("bfnc,chd->bfnhd", h, value["kernel"]) + value["bias"]
    h = np.einsum("bfnhd,hdc->bfnc", h, output["kernel"]) + output["bias"]
    z = z + h @ weights["temporal_projection"]["kernel"] + weights["temporal_projection"]["bias"]
    expected = jax.jit(image.apply)({"params": own}, z[:, 0], Layer(), c, Context())[0]
    np.testing.assert_allclose(got[:, 0], expected, rtol=1e-4, atol=1e-5)


def test_attention_in_parts_is_dense_attention_under_a_mask():
    """Verify (d): the same place over frames, the same frame over places."""
    x, c = block_inputs()
    block, params = block_params(x, c)
    frames, places = x.shape[1:3]
    flat = x.reshape(2, -1, x.shape[-1])
    frame, place = np.divmod(np.arange(frames * places), places)

    @jax.jit
    def both(x, flat):
        bound = block.bind({"params": params})
        parts = bound._over_time(x, Context(), False), bound._in_frames(x, Context(), False)
        dense = [
            mixer(flat, Context(segments=jnp.broadcast_to(jnp.asarray(group) + 1, (2, len(group)))))
            for mixer, group in ((bound.temporal, place), (bound.mixer, frame))
        ]
        return parts, dense

    for part, dense in zip(*both(x, flat), strict=True):
        np.testing.assert_allclose(part.reshape(dense.shape), dense, rtol=1e-5, atol=1e-6)
    assert np.max(np.abs(both(x, flat)[0][0] - both(x, flat)[0][1])) > 1e-2


@pytest.mark.slow
def test_frames_are_told_apart_by_their_positions_alone():
    x, c = block_inputs()
    block, params = block_params(x, c)
    run = jax.jit(lambda x: block.apply({"params": params}, x, Layer(), c, Context())[0])
    order = jnp.array([2, 0, 1])
    np.testing.assert_allclose(run(x[:, order]), run(x)[:, order], rtol=1e-4, atol=1e-5)
    model, args = tiny(), inputs()
    variables = randomised(model)
    whole = jax.jit(model.apply)
    moved = whole(variables, args[0][:, order], *args[1:])
    assert np.max(np.abs(moved - whole(variables, *args)[:, order])) > 1e-2


@pytest.mark.slow
def test_output_is_zero_at_first_and_every_parameter_has_a_gradient():
    model = tiny(remat="full")
    variables = meta.unbox(jax.jit(model.init)(jax.random.key(0), *inputs()))
    assert not np.any(jax.jit(model.apply)(variables, *inputs()))

    def loss(params):
        return jnp.mean(model.apply({"params": params}, *inputs(), train=True) ** 2)

    grads = jax.jit(jax.grad(loss))(randomised(model)["params"])
    for path, leaf in named_leaves(grads).items():
        assert np.all(np.isfinite(leaf)), path
        assert np.any(leaf != 0) or path.endswith("key/bias"), path  # a bias of all keys cancels


@pytest.mark.slow
def test_bfloat16_follows_the_parameters():
    model = tiny()
    variables = randomised(model)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables)
    x, t, label = inputs()
    out = jax.jit(model.apply)(half, x.astype(jnp.bfloat16), t, label)
    assert out.dtype == jnp.bfloat16
    full = jax.jit(model.apply)(variables, x, t, label)
    assert np.max(np.abs(out.astype(jnp.float32) - full)) < 0.1 * np.max(np.abs(full))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 4, 2), r"takes \[batch, frames, height, width, channels\], and this is \[2, 4, 4, 2\]"),
        ((5, 4, 4, 2), "made for 3 frames and this video has 5"),
        ((3, 5, 4, 2), "5 x 4 cannot be cut into patches of 2 x 2"),
    ],
)
def test_what_is_no_such_video_is_refused(shape, message):
    with pytest.raises(UsageError, match=message):
        jax.eval_shape(tiny().init, jax.random.key(0), *inputs(shape=shape))


def task_of_videos():
    process = DDPM(sigma="small", prediction="v")
    return Diffusion(model=tiny(learned_sigma=False), process=process, label_dropout=0.0, content="video")


@functools.cache
def drawn(cache):
    task = task_of_videos()
    how = Sampling(DDIMSampler(8), cache=cache)
    variables = randomised(task.model)

    @jax.jit
    def run(variables):
        keys = example_keys(jax.random.key(0), jnp.arange(2))
        return sample_classes(task, variables, jnp.zeros(2, jnp.int32), SHAPE, how, keys)

    return run(variables)


@pytest.mark.slow
def test_step_caches_that_skip_nothing_draw_the_same_videos():
    task = task_of_videos()
    stages = task.stages(randomised(task.model))
    for cache in (ConfidenceTaylor(threshold=0.0), everything(8, stages)):
        np.testing.assert_array_equal(drawn(cache), drawn(None))
    assert np.any(drawn(ConfidenceTaylor(threshold=math.inf, warmup=2)) != drawn(None))
