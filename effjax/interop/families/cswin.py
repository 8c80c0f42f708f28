"""The authors' CSWin Transformers, by the names of their code.

Source of names, defaults and shapes: the repository microsoft/CSWin-Transformer, `models/cswin.py`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effjax.config import build as build_section
from effjax.ffn.mlp import MLP
from effjax.interop import names as n
from effjax.interop.families.stages import stage_rows
from effjax.interop.families.vit import fused, linear, norm_rows
from effjax.interop.family import Family
from effjax.layers.conv import ConvNorm
from effjax.layers.downsample import Convs
from effjax.mixers.cross_shaped_window import CrossShapedWindow
from effjax.models.blocks.metaformer import Block
from effjax.models.heads import Linear
from effjax.models.pyramid import Pyramid, Stage

EPSILON = 1e-5
_DEPTHWISE = "c 1 u v -> u v c"


@dataclasses.dataclass(frozen=True)
class CSWinConfig:
    """The arguments of their class, with its defaults where it has sensible ones."""

    img_size: int = 224
    in_chans: int = 3
    num_classes: int = 1000
    embed_dim: int = 64
    depth: tuple[int, ...] = (1, 2, 21, 1)
    split_size: tuple[int, ...] = (1, 2, 7, 7)
    num_heads: tuple[int, ...] = (2, 4, 8, 16)
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    drop_path_rate: float = 0.0


def build(config: Mapping[str, Any]) -> Pyramid:
    """Makes the model; a stripe that covers the map of its stage is one branch, as in the last stage."""
    c = build_section(CSWinConfig, config, "config")
    return Pyramid(
        stages=tuple(_stage(c, i) for i in range(4)),
        classes=c.num_classes,
        stem=_conv(kernel=7, stride=4, padding=2),
        head=Linear(epsilon=EPSILON),
        drop_path=c.drop_path_rate,
    )


def _conv(**options: int) -> Convs:
    return Convs(layers=(ConvNorm(use_bias=True, norm="layer", epsilon=EPSILON, **options),))  # type: ignore[arg-type]


def _stage(c: CSWinConfig, i: int) -> Stage:
    dim, stripe = c.embed_dim * 2**i, c.split_size[i]
    whole = i == 3 or stripe == c.img_size // 4 // 2**i
    mixer = CrossShapedWindow(c.num_heads[i], stripe=None if whole else stripe, qkv_bias=c.qkv_bias)
    block = Block(mixer=mixer, ffn=MLP(hidden=int(dim * c.mlp_ratio)), epsilon=EPSILON)
    return Stage(c.depth[i], dim, blocks=(block,), downsample=_conv(kernel=3, stride=2) if i else None)


def inputs(model: Pyramid, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """One picture of the configured size."""
    c = build_section(CSWinConfig, config, "config")
    return (jax.ShapeDtypeStruct((1, c.img_size, c.img_size, c.in_chans), jnp.float32),)


def names(model: Pyramid) -> tuple[n.Row, ...]:
    """The name map."""
    rows = _conv_rows("stage1_conv_embed.0", "stage1_conv_embed.2", "stem")
    for i, stage in enumerate(model.stages):
        if i:
            rows += _conv_rows(f"merge{i}.conv", f"merge{i}.norm", f"stages_{i}/downsample")
        rows += stage_rows(stage, f"stages_{i}", f"stage{i + 1}.{{layer}}", _block_rows)
    rows += norm_rows("norm", "head/norm", "layer")
    return (*rows, *linear("head", "head/classifier", classifier=True))


def _conv_rows(conv: str, norm: str, ours: str) -> list[n.Row]:
    return [
        *linear(conv, f"{ours}/layers_0/conv", n.CONV),
        *norm_rows(norm, f"{ours}/layers_0/norm", "layer"),
    ]


def _block_rows(block: Block, theirs: str, ours: str) -> list[n.Row]:
    mixer = f"{ours}/mixer"
    rows = norm_rows(f"{theirs}.norm1", f"{ours}/mixer_norm", "layer")
    rows += norm_rows(f"{theirs}.norm2", f"{ours}/ffn_norm", "layer")
    rows += fused(f"{theirs}.qkv", mixer, ("query", "key", "value"), block.mixer.qkv_bias)
    branches = ("lepe",) if block.mixer.stripe is None else ("lepe_columns", "lepe_rows")
    for i, branch in enumerate(branches):
        rows += linear(f"{theirs}.attns.{i}.get_v", f"{mixer}/{branch}", _DEPTHWISE)
    rows += linear(f"{theirs}.proj", f"{mixer}/output")
    rows += linear(f"{theirs}.mlp.fc1", f"{ours}/ffn/expand")
    return rows + linear(f"{theirs}.mlp.fc2", f"{ours}/ffn/contract")


_SMALL = dict(depth=(2, 4, 32, 2))
_BASE = dict(_SMALL, embed_dim=96, num_heads=(4, 8, 16, 32))
_LARGE = dict(_SMALL, embed_dim=144, num_heads=(6, 12, 24, 24))
_FINE = dict(img_size=384, split_size=(1, 2, 12, 12))
_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "CSWin_64_12211_tiny_224": {},
    "CSWin_64_24322_small_224": _SMALL,
    "CSWin_96_24322_base_224": _BASE,
    "CSWin_96_24322_base_384": _BASE | _FINE,
    "CSWin_144_24322_large_224": _LARGE,
    "CSWin_144_24322_large_384": _LARGE | _FINE,
}

OFFICIAL: dict[str, Family] = {
    name: Family(build, names, inputs, defaults) for name, defaults in _ARCHITECTURES.items()
}
