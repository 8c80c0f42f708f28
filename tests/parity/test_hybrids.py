"""Parts that MOAT shares with timm's CoAtNet and MaxViT, and the names of architectures."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import timm
import torch
from timm.models.maxxvit import AttentionCl, MaxxVitConvCfg, MbConvBlock, RelPosBias

from effjax.interop import load_variables
from effjax.interop import names as n
from effjax.interop.families import FAMILIES, lowformer, nextvit
from effjax.interop.families.stages import COUNTERS, DEPTHWISE, PLACE, batch_norm, layer
from effjax.interop.family import Family
from effjax.layers.squeeze_excite import SqueezeExcite
from effjax.mixers.context import Context
from effjax.mixers.position_bias import InterpolatedTable, RelativeTable
from effjax.mixers.shifted_window import ShiftedWindow
from effjax.models.blocks.mbconv import MBConv
from tests.parity.case import Case, original, state


def loaded(monkeypatch, block, rows, inputs, module):
    """Variables of a block of ours with the weights of theirs."""
    shapes = tuple(jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), x) for x in inputs)
    family = Family(lambda config: block, lambda model: tuple(rows), lambda model, config: shapes)
    monkeypatch.setitem(FAMILIES, "timm:part", family)
    return load_variables("timm:part", state(module), {})[1]


def drawn(make):
    """A module of theirs with random parameters and averages."""
    return original(Case("", {}, make, None, None))


@pytest.mark.parametrize("squeeze", [False, True])
# At the edge of an odd map the means of timm's shortcut count zeros beyond it. TensorFlow's, in which MOAT is
# written, do not, so that strides are compared on even maps.
@pytest.mark.parametrize(
    ("into", "out", "stride", "side"),
    [(8, 8, 1, 8), (8, 8, 1, 9), (8, 12, 2, 8), (8, 8, 2, 8), (8, 8, 2, 10)],
)
def test_the_mobile_convolution_is_timm_s(monkeypatch, into, out, stride, side, squeeze):
    cfg = MaxxVitConvCfg(
        padding="same", attn_layer="se" if squeeze else "", norm_eps=1e-3, attn_act_layer="silu"
    )
    module = drawn(lambda: MbConvBlock(into, out, stride, cfg=cfg))
    rows = [COUNTERS, *batch_norm("pre_norm", "norm"), *layer("conv3_1x1", "project/conv", PLACE)]
    rows += layer("conv1_1x1", "expand/conv", PLACE, bias=False)
    rows += layer("conv2_kxk", "depthwise/conv", DEPTHWISE, bias=False)
    rows += (*batch_norm("norm1", "expand/norm"), *batch_norm("norm2", "depthwise/norm"))
    if squeeze:
        rows += (*layer("se.fc1", "squeeze/reduce", PLACE), *layer("se.fc2", "squeeze/expand", PLACE))
    if into != out:
        rows += layer("shortcut.expand", "shortcut_project", PLACE)
    block = MBConv(
        out,
        stride,
        ratio_of="output",
        pre_norm="batch",
        outer_norm=None,
        squeeze=SqueezeExcite(hidden=int(out * 0.25), activation="silu") if squeeze else None,
        padding="same",
        epsilon=1e-3,
    )
    x = np.random.default_rng(0).standard_normal((2, side, side, into), dtype=np.float32)
    inputs = jnp.asarray(x), jnp.zeros(()), Context()
    variables = loaded(monkeypatch, block, rows, inputs, module)
    ours, _ = block.apply(variables, *inputs)
    with torch.no_grad():
        theirs = module(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("bias", [RelativeTable(), InterpolatedTable(5)])
def test_attention_with_relative_positions_is_timm_s(monkeypatch, bias):
    table = functools.partial(RelPosBias, window_size=(5, 5))
    module = drawn(lambda: AttentionCl(24, dim_head=8, head_first=False, rel_pos_cls=table))
    qkv = ("query", "key", "value")
    rows = [
        n.Name("qkv.weight", tuple(f"{part}/kernel" for part in qkv), n.FUSED_IN),
        n.Name("qkv.bias", tuple(f"{part}/bias" for part in qkv), n.FUSED_IN_BIAS),
        n.Name("proj.weight", "output/kernel", n.HEADS_OUT),
        n.Name("proj.bias", "output/bias"),
        n.Name("rel_pos.relative_position_bias_table", "bias/table"),
        n.Ignored("rel_pos.relative_position_index", "made anew"),
    ]
    mixer = ShiftedWindow(3, window=5, bias=bias)
    x = np.random.default_rng(0).standard_normal((2, 5, 5, 24), dtype=np.float32)
    inputs = jnp.asarray(x), Context()
    ours = mixer.apply(loaded(monkeypatch, mixer, rows, inputs, module), *inputs)
    with torch.no_grad():
        theirs = module(torch.from_numpy(x)).numpy()
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize(("module", "known"), [("lowformer", lowformer.TIMM), ("nextvit", nextvit.TIMM)])
def test_every_architecture_of_timm_is_known_with_its_parameters(module, known):
    assert set(timm.list_models(module=module)) == set(known)
    for name, family in known.items():
        model = family.build(family.defaults)
        shapes = jax.eval_shape(model.init, jax.random.key(0), *family.inputs(model, {}))
        count = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
        assert count == sum(p.numel() for p in timm.create_model(name).parameters())
