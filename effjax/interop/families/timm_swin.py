"""timm's Swin Transformers, the first and the second version, and the S3 family (AutoFormerV2).

Source of names, defaults and shapes: timm 1.0.31, `timm/models/swin_transformer.py` and
`swin_transformer_v2.py`. The authors' own checkpoints, which keep the merging at the end of a stage, are read
too: timm's loader takes them as well.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from effjax.config import build as build_section
from effjax.errors import UsageError, did_you_mean
from effjax.ffn.mlp import MLP
from effjax.interop import names as n
from effjax.interop.families.stages import stage_rows
from effjax.interop.families.timm_swins import architectures
from effjax.interop.families.vit import fused, linear, norm_rows
from effjax.interop.family import Family
from effjax.interop.resize import Patches, RelativeBias
from effjax.layers import downsample
from effjax.mixers.position_bias import LogSpacedContinuous, RelativeTable
from effjax.mixers.shifted_window import ShiftedWindow
from effjax.mixers.windows import Window, fitted, sides
from effjax.models.blocks.metaformer import Block
from effjax.models.heads import Linear
from effjax.models.pyramid import Pyramid, Stage

POOLS: dict[str, Literal["mean", "max"]] = {"avg": "mean", "max": "max"}
EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class TimmSwin:
    """The keyword arguments of timm that are understood here, with timm's defaults.

    `version` is no argument of timm: it says which of its classes. A picture size that is not the one of the
    weights keeps the windows, as `timm.create_model` does, unless `window_size` is given with it.
    """

    img_size: int | tuple[int, int] = 224
    patch_size: int = 4
    in_chans: int = 3
    num_classes: int = 1000
    global_pool: str = "avg"
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int | tuple[Any, ...] = 7
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    drop_path_rate: float = 0.1
    pretrained_window_sizes: tuple[int, ...] = (0, 0, 0, 0)
    version: int = 1


def build(config: Mapping[str, Any]) -> Pyramid:
    """Makes the model from the keyword arguments of `timm.create_model`.

    Raises:
      UsageError: for an argument that is not understood.
    """
    c = build_section(TimmSwin, config, "config")
    if c.global_pool not in POOLS:
        raise UsageError(f"config.global_pool is {c.global_pool!r}. {did_you_mean(c.global_pool, POOLS)}")
    height, width = sides(c.img_size)
    grid = height // c.patch_size, width // c.patch_size
    stages = []
    for i, window in enumerate(_windows(c)):
        if i:
            grid = (grid[0] + 1) // 2, (grid[1] + 1) // 2
        stages.append(_stage(c, i, fitted(window, grid)))
    return Pyramid(
        stages=tuple(stages),
        classes=c.num_classes,
        stem=downsample.Patches(c.patch_size, epsilon=EPSILON, edge="crop"),
        head=Linear(epsilon=EPSILON, pool=POOLS[c.global_pool]),
        drop_path=c.drop_path_rate,
    )


def _windows(c: TimmSwin) -> tuple[Window, ...]:
    """The window of each stage: one for all, a pair for all, or one a stage."""
    given, stages = c.window_size, len(c.depths)
    if isinstance(given, int) or (len(given) == 2 != stages):
        return (sides(given),) * stages
    return tuple(sides(window) for window in given)


def _stage(c: TimmSwin, i: int, window: Window) -> Stage:
    second = c.version == 2

    def block(shifted: bool) -> Block:
        mixer = ShiftedWindow(
            heads=c.num_heads[i],
            window=window,
            shifted=shifted,
            qkv_bias=c.qkv_bias,
            key_bias=not second,
            similarity="cosine" if second else "dot",
            bias=LogSpacedContinuous(trained=c.pretrained_window_sizes[i] or None)
            if second
            else RelativeTable(),
            pad="after_shift",
        )
        ffn = MLP(hidden=int(c.embed_dim * 2**i * c.mlp_ratio))
        order = dict(order="res_post_norm", norm_scale=0.0) if second else {}
        return Block(mixer=mixer, ffn=ffn, epsilon=EPSILON, **order)  # type: ignore[arg-type]

    return Stage(
        depth=c.depths[i],
        dim=c.embed_dim * 2**i,
        blocks=(block(False), block(True)),
        downsample=downsample.Merge(norm_first=not second, epsilon=EPSILON) if i else None,
    )


def inputs(model: Pyramid, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """One picture of the configured size."""
    c = build_section(TimmSwin, config, "config")
    return (jax.ShapeDtypeStruct((1, *sides(c.img_size), c.in_chans), jnp.float32),)


def names(model: Pyramid, official: bool = False) -> tuple[n.Row, ...]:
    """The name map; in the authors' checkpoints a stage ends with the merging, and the head is bare."""
    sizes = {"p": model.stem.patch, "q": model.stem.patch}
    rows: list[n.Row] = [
        n.Ignored(r".*\.(relative_position_index|relative_coords_table|attn_mask)", "it holds no parameters")
    ]
    rows.append(
        n.Name("patch_embed.proj.weight", "stem/embed/projection/kernel", n.PATCHES, sizes, resize=Patches())
    )
    rows.append(n.Name("patch_embed.proj.bias", "stem/embed/projection/bias"))
    rows += norm_rows("patch_embed.norm", "stem/norm", "layer")
    for i, stage in enumerate(model.stages):
        if stage.downsample is not None:
            theirs = f"layers.{i - 1 if official else i}.downsample"
            rows += norm_rows(f"{theirs}.norm", f"stages_{i}/downsample/norm", "layer")
            rows += linear(f"{theirs}.reduction", f"stages_{i}/downsample/reduction", bias=False)
        rows += stage_rows(stage, f"stages_{i}", f"layers.{i}.blocks.{{layer}}", _block_rows)
    rows += norm_rows("norm", "head/norm", "layer")
    return (*rows, *linear("head" if official else "head.fc", "head/classifier", classifier=True))


def _block_rows(block: Block, theirs: str, ours: str) -> list[n.Row]:
    mixer = block.mixer
    rows = norm_rows(f"{theirs}.norm1", f"{ours}/mixer_norm", "layer")
    rows += norm_rows(f"{theirs}.norm2", f"{ours}/ffn_norm", "layer")
    parts = ("query", "key", "value")
    rows += fused(f"{theirs}.attn.qkv", f"{ours}/mixer", parts, mixer.qkv_bias and mixer.key_bias)
    if mixer.qkv_bias and not mixer.key_bias:
        rows.append(n.Name(f"{theirs}.attn.q_bias", f"{ours}/mixer/query/bias", n.HEADS_IN_BIAS))
        rows.append(n.Name(f"{theirs}.attn.v_bias", f"{ours}/mixer/value/bias", n.HEADS_IN_BIAS))
    rows += linear(f"{theirs}.attn.proj", f"{ours}/mixer/output", n.HEADS_OUT)
    rows += bias_rows(f"{theirs}.attn", f"{ours}/mixer", mixer)
    rows += linear(f"{theirs}.mlp.fc1", f"{ours}/ffn/expand")
    return rows + linear(f"{theirs}.mlp.fc2", f"{ours}/ffn/contract")


def bias_rows(
    theirs: str,
    ours: str,
    mixer: Any,
    table: str = "relative_position_bias_table",
    network: str = "cpb_mlp",
) -> list[n.Row]:
    """The rows of what a mixer knows about positions, and of its temperature."""
    rows: list[n.Row] = []
    if mixer.similarity == "cosine":
        rows.append(n.Name(f"{theirs}.logit_scale", f"{ours}/logit_scale", "h 1 1 -> h"))
    if isinstance(mixer.bias, RelativeTable):
        resize = RelativeBias(sides(mixer.window))
        return [*rows, n.Name(f"{theirs}.{table}", f"{ours}/bias/table", resize=resize)]
    rows += linear(f"{theirs}.{network}.0", f"{ours}/bias/expand")
    return rows + linear(f"{theirs}.{network}.2", f"{ours}/bias/contract", bias=False)


def _families(version: int) -> dict[str, Family]:
    official = functools.partial(names, official=True)
    return {
        name: Family(build, names, inputs, dict(defaults, version=version), spellings=(official,))
        for name, defaults in architectures(version).items()
    }


TIMM: dict[str, Family] = {**_families(1), **_families(2)}
