"""timm's NextViT. Source of names, defaults and shapes: timm 1.0.31, `timm/models/nextvit.py`."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from effjax.config import build as build_section
from effjax.errors import UsageError, did_you_mean
from effjax.interop import names as n
from effjax.interop.families.stages import COUNTERS, PLACE, Place, batch_norm, blocks, layer
from effjax.interop.family import Family
from effjax.layers.conv import ConvNorm
from effjax.layers.downsample import Convs
from effjax.models.blocks.nextvit import NextConv, NextTransformer
from effjax.models.heads import Linear
from effjax.models.pyramid import Pyramid, Stage

POOLS = {"avg": "mean", "max": "max"}


@dataclasses.dataclass(frozen=True)
class TimmNextViT:
    """The keyword arguments of timm that are understood here, with timm's defaults.

    `stage_chs` is no argument of timm: it says what timm writes as constants, the channels of the convolution
    blocks and of the last block of a period, so that a toy loads as well.
    """

    in_chans: int = 3
    num_classes: int = 1000
    global_pool: str = "avg"
    stem_chs: tuple[int, ...] = (64, 32, 64)
    depths: tuple[int, ...] = (3, 4, 10, 3)
    strides: tuple[int, ...] = (1, 2, 2, 2)
    sr_ratios: tuple[int, ...] = (8, 4, 2, 1)
    drop_path_rate: float = 0.1
    head_dim: int = 32
    mix_block_ratio: float = 0.75
    stage_chs: tuple[tuple[int, int], ...] = ((96, 96), (192, 256), (384, 512), (768, 1024))


def build(config: Mapping[str, Any]) -> Pyramid:
    """Makes the model from the keyword arguments of `timm.create_model`.

    Raises:
      UsageError: for an argument that is not understood.
    """
    c = build_section(TimmNextViT, config, "config")
    if c.global_pool not in POOLS:
        raise UsageError(f"config.global_pool is {c.global_pool!r}. {did_you_mean(c.global_pool, POOLS)}")
    if len(c.depths) > 2 and c.depths[2] < 5:
        raise UsageError(f"config.depths[2] is {c.depths[2]}: the third stage has five blocks or more.")
    widths = (*c.stem_chs, c.stem_chs[-1])
    strides = (2, *(1,) * (len(widths) - 2), 2)
    stem = Convs(
        tuple(
            ConvNorm(width, stride=stride, activation="relu")
            for width, stride in zip(widths, strides, strict=True)
        )
    )
    return Pyramid(
        stages=tuple(_stage(c, i) for i in range(len(c.depths))),
        classes=c.num_classes,
        stem=stem,
        head=Linear(norm="batch", epsilon=1e-5, pool=cast(Any, POOLS[c.global_pool])),
        drop_path=c.drop_path_rate,
    )


def _stage(c: TimmNextViT, i: int) -> Stage:
    """A stage of periods: convolution blocks, then one attention block; the first stage has none."""
    narrow, wide = c.stage_chs[i]
    period, depth = c.depths[i], c.depths[i]
    if i == 2:
        period, depth = 5, depth // 5 * 5  # timm leaves out what makes no whole period
    conv = functools.partial(NextConv, narrow, head_dim=c.head_dim)
    cycle: tuple[nn.Module, ...] = (conv(),)
    if i > 0:
        far = _divisible(wide * c.mix_block_ratio, 32)
        attention = NextTransformer(wide, far, c.sr_ratios[i], head_dim=c.head_dim)
        cycle = (*(conv() for _ in range(period - 2)), attention, conv())
    return Stage(depth, narrow, cycle, first=conv(c.strides[i]))


def _divisible(width: float, divisor: int) -> int:
    """The multiple nearest to a width, and not less than nine tenths of it."""
    near = max(divisor, int(int(width) + divisor / 2) // divisor * divisor)
    return near + divisor if near < 0.9 * int(width) else near


def names(model: Pyramid) -> tuple[n.Row, ...]:
    """The name map."""
    stem = cast(Convs, model.stem)
    rows: list[n.Row] = [COUNTERS]
    for i in range(len(stem.layers)):
        rows += layer(f"stem.{i}.conv", f"stem/layers_{i}/conv", n.CONV, bias=False)
        rows += batch_norm(f"stem.{i}.norm", f"stem/layers_{i}/norm")
    channels = cast(int, stem.layers[-1].features)
    for i, stage in enumerate(model.stages):
        into = functools.partial(_block, into=channels)
        rows += blocks(stage, f"stages_{i}", f"stages.{i}.blocks", into)
        channels = _output(stage)
    rows += batch_norm("norm", "head/norm")
    rows += layer("head.fc", "head/classifier", n.LINEAR, classifier=True)
    return tuple(rows)


def _output(stage: Stage) -> int:
    """Channels behind the last block of a stage."""
    rest = stage.depth - 1
    last: Any = stage.blocks[(rest - 1) % len(stage.blocks)] if rest else stage.first
    return last.dim


def _block(place: Place, into: int) -> Iterator[n.Name]:
    block = cast(NextConv | NextTransformer, place.block)
    if place.before is not None:
        into = cast(Any, place.before).dim
    attends = isinstance(block, NextTransformer)
    inner = block.attention_dim if isinstance(block, NextTransformer) else block.dim
    if block.stride > 1 or into != inner:
        yield from layer("patch_embed.conv", "transition/project", PLACE, bias=False)
        yield from batch_norm("patch_embed.norm", "transition/norm")
    if isinstance(block, NextTransformer):
        yield from batch_norm("norm1", "mixer_norm")
        for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value")):
            yield n.Name(f"e_mhsa.{theirs}.weight", f"mhsa/{ours}/kernel", n.HEADS_IN)
            yield n.Name(f"e_mhsa.{theirs}.bias", f"mhsa/{ours}/bias", n.HEADS_IN_BIAS)
        yield from layer("e_mhsa.proj", "mhsa/output", n.HEADS_OUT, bias=False)
        yield n.Name("e_mhsa.proj.bias", "mhsa/output/bias")
        if block.pool > 1:
            yield from batch_norm("e_mhsa.norm", "mhsa/norm")
        yield from layer("projection.conv", "projection/project", PLACE, bias=False)
        yield from batch_norm("projection.norm", "projection/norm")
    yield from layer("mhca.group_conv3x3", "mhca/conv", n.CONV, bias=False)
    yield from batch_norm("mhca.norm", "mhca/norm")
    yield from layer("mhca.projection", "mhca/project", PLACE, bias=False)
    yield from batch_norm("norm2" if attends else "norm", "ffn_norm")
    yield from layer("mlp.fc1", "ffn/expand", PLACE)
    yield from layer("mlp.fc2", "ffn/contract", PLACE)


def inputs(model: Pyramid, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """A picture; no parameter depends on its size."""
    return (jax.ShapeDtypeStruct((1, 224, 224, config.get("in_chans", 3)), jnp.float32),)


def _family(depths: tuple[int, ...], drop_path: float) -> Family:
    return Family(build, names, inputs, dict(depths=depths, drop_path_rate=drop_path))


TIMM = {
    "nextvit_small": _family((3, 4, 10, 3), 0.1),
    "nextvit_base": _family((3, 4, 20, 3), 0.2),
    "nextvit_large": _family((3, 4, 30, 3), 0.2),
}
