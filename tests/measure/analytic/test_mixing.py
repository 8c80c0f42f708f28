"""Closed forms of mixers against the library's own counter, and LinGen's cost against its paper's figures."""

import itertools

import jax
import jax.numpy as jnp
import pytest
from flax.core import meta

from configs.diffusion.lingen import get_config
from effjax.config import build_kind
from effjax.errors import UsageError
from effjax.measure import count
from effjax.measure.analytic.mixing import lingen, mixing
from effjax.mixers import Attention, BidirectionalMamba2, Mamba2, Mate, Pooling, ShiftedVolume
from effjax.mixers.context import Context
from effjax.models import KINDS

TOY = dict(state=4, head=4, groups=2)


def counted(model, *inputs):
    params = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs))["params"]
    return count(lambda p, *x: model.apply({"params": p}, *x), params, *inputs)


@pytest.mark.parametrize(
    ("mixer", "grid"),
    [
        (Attention(2), (3, 4, 5)),
        (ShiftedVolume(2, (2, 2, 3), shifted=True), (3, 5, 3)),
        (Mamba2(**TOY), (13,)),
        (Mamba2(**TOY, chunk=4, use_bias=True, conv_bias=False), (13,)),
        (BidirectionalMamba2(**TOY, chunk=4), (13,)),
        (Mate(ShiftedVolume(2, (2, 2, 2)), BidirectionalMamba2(**TOY, chunk=16)), (3, 4, 6)),
        (Mate(ShiftedVolume(2, qkv_bias=False), BidirectionalMamba2(**TOY), review=None), (3, 4, 6)),
    ],
)
def test_a_mixer_is_counted_exactly(mixer, grid):
    cost = counted(mixer, jax.ShapeDtypeStruct((1, *grid, 8), jnp.float32), Context())
    closed = mixing(mixer, 8, grid)
    assert closed.parameters == cost.parameters
    assert closed.macs == cost.macs


def test_a_mixer_without_a_closed_form_is_named():
    with pytest.raises(UsageError, match="no closed form for Pooling"):
        mixing(Pooling(), 8, (4, 4))


def built(size):
    return build_kind(KINDS, get_config(size).model, "config.model")


@pytest.mark.slow
@pytest.mark.parametrize("size", ["smoke", "4b"])
def test_lingen_is_counted_exactly(size):
    model = built(size)
    video, text = ((4, 16, 16, 3), (5, 4)) if size == "smoke" else ((9, 64, 64, 16), (256, 4096))
    shapes = (1, *video), (1,), (1, *text)
    cost = counted(model, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    closed = lingen(model, video, text)
    assert closed.parameters == cost.parameters
    assert closed.macs == cost.macs


# Latents of 512 x 512 pixels and T seconds at 16 frames a second; an autoencoder shortens time 4-fold.
TEXT = 256, 4096


def frames(seconds, squeeze=4):
    return seconds * 16 // squeeze, 64, 64, 16


def test_cost_is_linear_in_pixels():
    model = built("4b")
    macs = [lingen(model, frames(seconds), TEXT).macs for seconds in (16, 32, 48, 64)]
    steps = {later - earlier for earlier, later in itertools.pairwise(macs)}
    assert len(steps) == 1
    assert steps.pop() / macs[0] > 0.999
    wide = lingen(model, (64, 128, 64, 16), TEXT).macs
    assert wide == macs[1]


def test_cost_against_attention_is_the_papers_order():
    """The paper: 15 times fewer operations than DiT-4B at 68 s of 512 pixels, whose widths it does not give.

    With a latent frame for four frames, here 13.8; for eight frames, 7.3, and of the mixers alone 20 and 10.
    """
    model = built("4b")
    dit = model.clone(
        dim=2560, depth=28, block=model.block.clone(heads=40, mixer=Attention(40))
    )  # of 4B as well
    assert lingen(model, frames(68), TEXT).parameters == pytest.approx(4e9, rel=0.01)
    assert lingen(dit, frames(68), TEXT).parameters == pytest.approx(4e9, rel=0.02)
    ratios = {}
    for squeeze in (4, 8):
        video = frames(68, squeeze)
        grid = video[0], 32, 32
        ratios[squeeze] = (
            lingen(dit, video, TEXT).macs / lingen(model, video, TEXT).macs,
            mixing(Attention(38), 2432, grid).macs / mixing(model.block.mixer, 2432, grid).macs,
        )
    assert ratios[4] == pytest.approx((13.8, 20.3), rel=0.01)
    assert ratios[8] == pytest.approx((7.3, 10.3), rel=0.01)
