"""timm's LowFormer, edge variants included.

Source of names, defaults and shapes: timm 1.0.31, `timm/models/lowformer.py`.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp

from effjax.config import build as build_section
from effjax.errors import UsageError
from effjax.ffn.mlp import MLP
from effjax.interop import names as n
from effjax.interop.families.stages import (
    COUNTERS,
    DEPTHWISE,
    PLACE,
    Place,
    affine,
    batch_norm,
    blocks,
    layer,
    under,
)
from effjax.interop.family import Family
from effjax.layers.conv import ConvNorm
from effjax.layers.downsample import Convs
from effjax.mixers.lowtention import Lowtention
from effjax.models.blocks.lowformer import LowFormer
from effjax.models.blocks.mbconv import MBConv
from effjax.models.heads import Wide
from effjax.models.pyramid import Pyramid, Stage

QKV = "(h part d) i 1 1 -> i h d"  # a head has its query, key and value side by side
PAINT = "i o u v -> u v i o"  # a transposed convolution


@dataclasses.dataclass(frozen=True)
class TimmLowFormer:
    """The keyword arguments of timm that are understood here, with timm's defaults."""

    width_list: tuple[int, ...]
    depth_list: tuple[int, ...]
    in_chans: int = 3
    num_classes: int = 1000
    global_pool: str = "avg"
    head_widths: tuple[int, int] = (1536, 1600)
    drop_path_rate: float = 0.0
    expand_ratio: float = 4.0
    fused_conv: bool = True
    attn: bool = True
    attn_mlp: bool = True
    attn_mlp_ratio: float = 4.0
    stem_expand_ratio: float = 2.0
    downsample_expand_ratios: tuple[float, ...] | None = None


def build(config: Mapping[str, Any]) -> Pyramid:
    """Makes the model from the keyword arguments of `timm.create_model`.

    Raises:
      UsageError: for an argument that is not understood.
    """
    c = build_section(TimmLowFormer, config, "config")
    if c.global_pool != "avg":
        raise UsageError(f"config.global_pool is {c.global_pool!r}; 'avg' is understood here.")
    conv = _conv(c)
    stages = []
    if c.depth_list[0]:
        stem = conv(ratio=c.stem_expand_ratio)
        stages.append(Stage(c.depth_list[0], c.width_list[0], (stem,)))
    downs = c.downsample_expand_ratios or (c.expand_ratio,) * len(c.width_list[1:])
    rows = zip(c.width_list[1:], c.depth_list[1:], downs, strict=True)
    for i, (dim, depth, ratio) in enumerate(rows, start=1):
        first = conv(dim=dim, stride=2, ratio=ratio, shortcut=False)
        if i >= 3:
            stages.append(Stage(depth + 1, dim, (_attention(c, dim, 2 if i == 3 else 1),), first=first))
        elif depth:
            stages.append(Stage(depth, dim, (conv(ratio=c.expand_ratio),), first=first))
    return Pyramid(
        stages=tuple(stages),
        classes=c.num_classes,
        stem=Convs((ConvNorm(c.width_list[0], stride=2, activation="hard_swish"),)),
        head=Wide(c.head_widths),
        drop_path=c.drop_path_rate,
    )


def _conv(c: TimmLowFormer) -> functools.partial[MBConv]:
    norm: Any = "batch" if c.fused_conv else None
    return functools.partial(MBConv, fused=c.fused_conv, inner_norm=norm, activation="hard_swish")


def _attention(c: TimmLowFormer, dim: int, stride: int) -> LowFormer:
    fused = c.fused_conv and dim < 256
    inner: Any = "batch" if fused else None
    local = _conv(c)(ratio=c.expand_ratio, fused=fused, inner_norm=inner, inner_bias=True)
    heads = max(1, int(dim * 0.5) // 30)
    mixer = Lowtention(
        heads,
        int(dim // heads * 0.5),
        stride,
        kernel=5 if stride > 1 else 3,
        upsampling="dense" if c.fused_conv else "depthwise",
    )
    ffn = MLP(ratio=c.attn_mlp_ratio) if c.attn_mlp else None
    return LowFormer(mixer if c.attn else None, ffn, local)


def names(model: Pyramid) -> tuple[n.Row, ...]:
    """The name map."""
    rows: list[n.Row] = [COUNTERS]
    rows += layer("stem.0.conv", "stem/layers_0/conv", n.CONV, bias=False)
    rows += batch_norm("stem.0.norm", "stem/layers_0/norm")
    number = 0
    for i, stage in enumerate(model.stages):
        if stage.first is None:  # blocks at the resolution of the stem, which timm counts to it
            rows += blocks(stage, f"stages_{i}", "stem", _block, offset=1)
            continue
        rows += blocks(stage, f"stages_{i}", f"stages.{number}", _block)
        number += 1
    rows += layer("in_conv.conv", "head/expand/conv", PLACE, bias=False)
    rows += batch_norm("in_conv.norm", "head/expand/norm")
    rows += layer("pre_classifier.0", "head/hidden", n.LINEAR, bias=False)
    rows += affine("pre_classifier.1", "head/norm")
    rows += layer("classifier", "head/classifier", n.LINEAR, classifier=True)
    return tuple(rows)


def _block(place: Place) -> Iterator[n.Name]:
    block = place.block
    if isinstance(block, MBConv):
        yield from (under(row, "", "main") for row in _mbconv(block))
        return
    block = cast(LowFormer, block)
    if block.mixer is not None:
        attention = "attn.main" if block.ffn is None else "attn.main.1"
        if block.ffn is not None:
            yield from affine("attn.main.0", "mixer_norm")
        yield from (under(row, "mixer", attention) for row in _lowtention(block.mixer))
    if block.ffn is not None:
        yield from affine("mlp.main.0", "ffn_norm")
        yield from layer("mlp.main.1", "ffn/expand", PLACE)
        yield from layer("mlp.main.3", "ffn/contract", PLACE)
    yield from (under(row, "local", "local.main") for row in _mbconv(block.local))


def _mbconv(block: MBConv) -> Iterator[n.Name]:
    if block.fused:
        inner: tuple[tuple[str, str, str], ...] = (("spatial_conv", "expand", n.CONV),)
    else:
        inner = ("inverted_conv", "expand", PLACE), ("depth_conv", "depthwise", DEPTHWISE)
    for theirs, ours, layout in inner:
        yield from layer(f"{theirs}.conv", f"{ours}/conv", layout, bias=block.inner_bias)
        if block.inner_norm is not None:
            yield from batch_norm(f"{theirs}.norm", f"{ours}/norm")
    yield from layer("point_conv.conv", "project/conv", PLACE, bias=False)
    yield from batch_norm("point_conv.norm", "project/norm")


def _lowtention(mixer: Lowtention) -> Iterator[n.Name]:
    yield from layer("conv_proj.conv", "down/conv", DEPTHWISE, bias=False)
    yield from batch_norm("conv_proj.norm", "down/norm")
    yield n.Name("pwise.weight", ("query/kernel", "key/kernel", "value/kernel"), QKV)
    if mixer.upsampling == "depthwise":
        yield n.Name("o_proj.weight", "output/kernel", "o (h d) 1 1 -> h d o")
        yield n.Name("o_proj.bias", "output/bias")
        yield from layer("upsampling", "up", DEPTHWISE)
    else:
        yield from layer("upsampling", "up", PAINT)


def inputs(model: Pyramid, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """A picture; no parameter depends on its size."""
    return (jax.ShapeDtypeStruct((1, 224, 224, config.get("in_chans", 3)), jnp.float32),)


def _family(widths: tuple[int, ...], depths: tuple[int, ...], **more: Any) -> Family:
    defaults = dict(width_list=widths, depth_list=depths, **more)
    return Family(build, names, inputs, defaults)


_SIX = dict(downsample_expand_ratios=(6.0,) * 4)
_LARGE = dict(_SIX, stem_expand_ratio=4.0)
_HEAD = dict(_SIX, head_widths=(2304, 2560))
_B = (16, 32, 64, 128, 256)
_B15 = (20, 40, 80, 160, 320)
_B3 = (32, 64, 128, 256, 512)

TIMM = {
    "lowformer_b0": _family(_B, (0, 1, 1, 3, 4)),
    "lowformer_b1": _family(_B, (0, 1, 1, 5, 5), **_SIX),
    "lowformer_b15": _family(_B15, (0, 1, 1, 6, 6), **_HEAD),
    "lowformer_b2": _family((24, 48, 96, 192, 384), (0, 1, 1, 6, 6), **_HEAD),
    "lowformer_b3": _family(_B3, (1, 2, 3, 6, 6), **_LARGE),
    "lowformer_e1": _family(_B15, (0, 1, 1, 4, 4), attn=False, attn_mlp=False, **_HEAD),
    "lowformer_e2": _family(_B3, (1, 2, 3, 4, 4), attn=False, attn_mlp=False, **_LARGE),
    "lowformer_e3": _family(_B3, (1, 2, 3, 6, 6), attn_mlp=False, **_LARGE),
}
