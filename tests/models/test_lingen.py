"""LinGen against its blocks one by one, its text, its pieces, and the size of the paper."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from configs.diffusion.lingen import VARIANTS, get_config
from effjax.config import build_kind
from effjax.diffusion.caches.blockwise import everything
from effjax.diffusion.caches.taylor import ConfidenceTaylor
from effjax.diffusion.examples import example_keys
from effjax.diffusion.guidance import guided
from effjax.diffusion.rectified_flow import RectifiedFlow
from effjax.diffusion.samplers import EulerSampler, walk
from effjax.errors import UsageError
from effjax.experiment import resolve
from effjax.ffn.mlp import MLP
from effjax.mixers import Attention, BidirectionalMamba2, Mate, ShiftedVolume
from effjax.mixers.context import Context
from effjax.models import KINDS
from effjax.models.blocks.adaln import Layer
from effjax.models.blocks.video_text import VideoTextBlock
from effjax.models.lingen import LinGen
from effjax.train.tasks.diffusion import Diffusion

SHAPE = (3, 4, 6, 2)


def tiny(depth=5, **changes):
    scan = BidirectionalMamba2(state=4, head=4, chunk=8)
    mate = Mate(ShiftedVolume(2, (2, 2, 2)), scan)
    block = VideoTextBlock(heads=2, mixer=mate, ffn=MLP(activation="gelu_tanh"))
    return LinGen(**{"patch": 2, "dim": 8, "depth": depth, "block": block, "frequencies": 6, **changes})


def inputs(shape=SHAPE, words=(3, 5)):
    draw = np.random.default_rng(5)
    x, text = (jnp.asarray(draw.normal(size=(2, *s)).astype(np.float32)) for s in (shape, words))
    return x, jnp.array([1.0, 900.0]), text.at[0, 1].set(0.0)  # the first text has two words


def randomised(model):
    """Parameters with no zeros, so that every path counts."""
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs()))
    draw = np.random.default_rng(9)
    return jax.tree.map(lambda s: jnp.asarray(0.3 * draw.normal(size=s.shape), s.dtype), shapes)


@functools.cache
def ran():
    model = tiny()
    return jax.jit(model.apply)(randomised(model), *inputs())


@pytest.mark.slow
def test_layers_are_blocks_whose_order_and_windows_rotate():
    """Also where the rotation does not divide the depth: the fifth layer is the first again."""
    model, args = tiny(), inputs()
    variables = randomised(model)
    block = model.block.clone(parent=None)

    @functools.partial(jax.jit, static_argnums=1)
    def one_by_one(variables, turns):
        stream = model.apply(variables, *args, method="begin")
        x, (frames, rows, columns) = stream.x, stream.grid
        told = stream.c, stream.text, stream.valid, Context(grid=(frames, rows, columns))
        for i in range(5):
            layer = jax.tree.map(lambda leaf, i=i: leaf[i], variables["params"]["blocks"])
            x, _ = block.apply({"params": layer}, x, Layer(), *told, point=i % turns)
        return model.apply(variables, stream.replace(x=x), method="finish")

    np.testing.assert_allclose(ran(), one_by_one(variables, 4), rtol=1e-4, atol=1e-5)
    assert np.abs(ran() - one_by_one(variables, 2)).max() > 1e-3


def test_a_text_is_its_words_and_none_is_all_zeros():
    model, (x, t, text) = tiny(depth=1), inputs()
    variables, run = randomised(model), jax.jit(model.apply)
    out = run(variables, x, t, text)
    longer = jnp.concatenate([text, jnp.zeros((2, 1, 5))], axis=1)  # a place without a word changes nothing
    np.testing.assert_allclose(run(variables, x, t, longer), out, rtol=1e-4, atol=1e-5)
    assert (np.abs(run(variables, x, t, text[:, ::-1] * 2) - out).max((1, 2, 3, 4)) > 1e-3).all()
    assert not model.null(text).any()
    silent = [run(variables, x, t, model.null(some)) for some in (text, longer)]
    np.testing.assert_allclose(*silent, rtol=1e-4, atol=1e-5)
    assert np.abs(silent[0] - out).max() > 1e-3


def test_output_is_zero_and_blocks_are_the_identity_at_first():
    model = tiny(depth=1)
    variables = meta.unbox(jax.jit(model.init)(jax.random.key(0), *inputs()))
    out = jax.jit(model.apply)(variables, *inputs())
    assert out.shape == (2, *SHAPE)
    np.testing.assert_array_equal(out, 0.0)

    @jax.jit
    def through(variables):
        stream = model.apply(variables, *inputs(), method="begin")
        return stream.x, model.apply(variables, stream, method="layers").x

    np.testing.assert_array_equal(*through(variables))


@pytest.mark.slow
def test_every_parameter_has_a_gradient_also_where_layers_are_computed_again():
    args = inputs()
    slopes = []
    for remat in ("none", "full"):
        model = tiny(depth=4, remat=remat)
        loss = lambda p, model=model: jnp.mean(jnp.sin(model.apply(p, *args, train=True)))
        slopes.append(jax.jit(jax.grad(loss))(randomised(model)))
    for path, leaf in jax.tree_util.tree_leaves_with_path(slopes[0]):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(leaf).all(), name
        # A bias of all keys cancels.
        assert np.abs(leaf).max() > 0 or "['key']['bias']" in name, name
    for one, other in zip(*map(jax.tree.leaves, slopes), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_bfloat16_follows_the_parameters():
    model, (x, t, text) = tiny(), inputs()
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), randomised(model))
    out = jax.jit(model.apply)(half, x.astype(jnp.bfloat16), t, text)
    assert out.dtype == jnp.bfloat16
    assert np.abs(out.astype(jnp.float32) - ran()).max() < 0.1 * np.abs(ran()).max()


@pytest.mark.slow
@pytest.mark.parametrize("frames", [1, 5])
def test_a_picture_is_a_video_of_one_frame_and_attention_may_mix_it(frames):
    model = tiny(depth=1)
    x, t, text = inputs((frames, 4, 6, 2))
    variables = randomised(model)
    assert jax.jit(model.apply)(variables, x, t, text).shape == x.shape
    dit = model.clone(block=model.block.clone(mixer=Attention(2)))
    assert jax.jit(dit.apply)(randomised(dit), x, t, text).shape == x.shape


@pytest.mark.parametrize(
    ("shape", "words", "message"),
    [
        ((4, 6, 2), (3, 5), r"are \[2, 4, 6, 2\] and \[2, 3, 5\]: set config.task.content"),
        (SHAPE, (5,), r"takes \[batch, frames, height, width, channels\] and a text of \[batch, words"),
        ((3, 5, 6, 2), (3, 5), "5 x 6 cannot be cut into patches of 2 x 2"),
    ],
)
def test_what_is_no_video_or_no_text_is_refused(shape, words, message):
    draw = np.random.default_rng(0)
    x, text = (jnp.asarray(draw.normal(size=(2, *s)), jnp.float32) for s in (shape, words))
    with pytest.raises(UsageError, match=message):
        jax.eval_shape(tiny().init, jax.random.key(0), x, jnp.zeros(2), text)


@functools.cache
def drawn(cache):
    model = tiny(depth=2)
    task = Diffusion(model, RectifiedFlow(), content="video", condition="text")
    (_, _, text), how = inputs(), EulerSampler(4)

    @jax.jit
    def run(variables):
        denoiser = task.denoiser(variables) if cache is None else cache.wrap(task.stages(variables), 4)
        guide = guided(denoiser, 2.0, task.null)
        keys = example_keys(jax.random.key(0), jnp.arange(2))
        return walk(how, guide, task.process, text, SHAPE, keys)[0].x

    return run(randomised(model))


@pytest.mark.slow
def test_step_caches_that_skip_nothing_draw_the_same_guided_videos():
    stages = Diffusion(tiny(depth=2), RectifiedFlow(), content="video", condition="text").stages(
        randomised(tiny(depth=2))
    )
    for cache in (ConfidenceTaylor(threshold=0.0), everything(4, stages)):
        # To rounding: a layer by itself is fused otherwise than in a round of four.
        np.testing.assert_allclose(drawn(cache), drawn(None), rtol=1e-4, atol=1e-5)
    assert np.any(drawn(ConfidenceTaylor(threshold=math.inf, warmup=2)) != drawn(None))


def test_the_paper_s_size():
    model = build_kind(KINDS, get_config("4b").model, "config.model")
    shapes = (1, 2, 64, 64, 16), (1,), (1, 8, 4096)
    args = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    leaves = jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0), *args))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == pytest.approx(4e9, rel=0.01)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_resolves(variant):
    experiment = resolve(get_config(variant))
    assert experiment.task.content == "video"
    if variant == "4b":
        batch = experiment.data.described().example_batch(1)
        assert batch["video"].shape == (1, 68 * 16 // 4, 64, 64, 16)
        assert batch["text"].shape == (1, 256, 4096)
