"""timm's FocalNet.

The authors' `large_fl4` divides its gated sums by their number of terms, which timm's function of that name
leaves out: give `normalize_modulator=True` to have the authors' network.

Source of names, defaults and shapes: timm 1.0.31, `timm/models/focalnet.py`; microsoft/FocalNet,
`configs/*.yaml`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effjax.config import build as build_section
from effjax.ffn.mlp import MLP
from effjax.interop import names as n
from effjax.interop.families.timm_convnext import patch_rows
from effjax.interop.families.vit import linear, norm_rows
from effjax.interop.family import Family
from effjax.layers.conv import ConvNorm
from effjax.layers.downsample import Convs, Patches
from effjax.mixers.focal_modulation import FocalModulation
from effjax.models.blocks.metaformer import Block
from effjax.models.heads import Linear
from effjax.models.pyramid import Pyramid, Stage

EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class TimmFocalNet:
    """The keyword arguments of timm that are understood here, with timm's defaults."""

    in_chans: int = 3
    num_classes: int = 1000
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    mlp_ratio: float = 4.0
    focal_levels: tuple[int, ...] = (2, 2, 2, 2)
    focal_windows: tuple[int, ...] = (3, 3, 3, 3)
    use_overlap_down: bool = False
    use_post_norm: bool = False
    use_post_norm_in_modulation: bool = False
    normalize_modulator: bool = False
    layerscale_value: float | None = None
    drop_path_rate: float = 0.1


def build(config: Mapping[str, Any]) -> Pyramid:
    """Makes the model from the keyword arguments of `timm.create_model`.

    Raises:
      UsageError: for an argument that is not understood.
    """
    c = build_section(TimmFocalNet, config, "config")
    return focalnet(c, classes=c.num_classes, edge="crop")


def focalnet(
    c: Any, classes: int, edge: Any, patch: int = 4, epsilon: float = EPSILON, activation: str = "gelu"
) -> Pyramid:
    """A FocalNet from what timm calls its parts."""

    def block(dim: int, level: int, window: int) -> Block:
        return Block(
            mixer=FocalModulation(
                levels=level,
                kernel=window,
                norm="layer" if c.use_post_norm_in_modulation else None,
                epsilon=epsilon,
                averaged=c.normalize_modulator,
            ),
            ffn=MLP(hidden=int(dim * c.mlp_ratio), activation=activation),
            epsilon=epsilon,
            layer_scale=c.layerscale_value,
            order="res_post_norm" if c.use_post_norm else "pre_norm",
        )

    def coarser(side: int) -> Patches | Convs:
        if not c.use_overlap_down:
            return Patches(side, epsilon=epsilon, edge=edge)
        size = (7, 4, 2) if side == patch else (3, 2, 1)  # kernel, stride, padding
        return Convs((ConvNorm(None, *size, use_bias=True, norm="layer", epsilon=epsilon),))

    dims = [c.embed_dim * 2**i for i in range(len(c.depths))]
    columns = zip(c.depths, dims, c.focal_levels, c.focal_windows, strict=True)
    return Pyramid(
        stages=tuple(
            Stage(
                depth=depth,
                dim=dim,
                blocks=(block(dim, level, window),),
                downsample=coarser(2) if i else None,
            )
            for i, (depth, dim, level, window) in enumerate(columns)
        ),
        classes=classes,
        stem=coarser(patch),
        head=Linear(epsilon=epsilon),
        drop_path=c.drop_path_rate,
    )


def inputs(model: Pyramid, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """One picture; the network is made for all sizes."""
    return (jax.ShapeDtypeStruct((1, 64, 64, config.get("in_chans", 3)), jnp.float32),)


def names(model: Pyramid) -> tuple[n.Row, ...]:
    """The name map."""
    rows = embed_rows(model.stem, "stem.proj", "stem.norm", "stem")
    for i, stage in enumerate(model.stages):
        theirs, ours = f"layers.{i}.downsample", f"stages_{i}/downsample"
        if stage.downsample is not None:
            rows += embed_rows(stage.downsample, f"{theirs}.proj", f"{theirs}.norm", ours)
        theirs, ours = f"layers.{i}.blocks.{{layer}}", f"stages_{i}/stack"
        block = stage.blocks[0]
        behind = "_post" if block.order == "res_post_norm" else ""
        rows += norm_rows(f"{theirs}.norm1{behind}", f"{ours}/mixer_norm", "layer")
        rows += norm_rows(f"{theirs}.norm2{behind}", f"{ours}/ffn_norm", "layer")
        parts = {"f": n.POINTWISE, "h": n.POINTWISE, "proj": n.POINTWISE}
        rows += modulation_rows(f"{theirs}.modulation", f"{ours}/mixer", block.mixer, parts, "norm")
        rows += linear(f"{theirs}.mlp.fc1", f"{ours}/ffn/expand", n.POINTWISE)
        rows += linear(f"{theirs}.mlp.fc2", f"{ours}/ffn/contract", n.POINTWISE)
        if block.layer_scale is not None:
            rows.append(n.Name(f"{theirs}.ls1.gamma", f"{ours}/mixer_scale"))
            rows.append(n.Name(f"{theirs}.ls2.gamma", f"{ours}/ffn_scale"))
    rows += norm_rows("norm", "head/norm", "layer")
    return (*rows, *linear("head.fc", "head/classifier", classifier=True))


def embed_rows(module: Any, projection: str, norm: str, ours: str) -> list[n.Row]:
    """The rows of what makes a map coarser: patches, or a convolution that overlaps."""
    if isinstance(module, Patches):
        return patch_rows(projection, ours, module.patch) + norm_rows(norm, f"{ours}/norm", "layer")
    rows = linear(projection, f"{ours}/layers_0/conv", n.CONV)
    return rows + norm_rows(norm, f"{ours}/layers_0/norm", "layer")


def modulation_rows(
    theirs: str, ours: str, mixer: FocalModulation, parts: Mapping[str, str], norm: str
) -> list[n.Row]:
    """The rows of a focal modulation.

    Args:
      theirs: their name of it.
      ours: our path.
      mixer: the modulation.
      parts: their names of the projections in, of the modulator and out, with the layouts of their kernels.
      norm: their name of the norm within.
    """
    (inner, into), (modulator, middle), (outer, out) = parts.items()
    split = ("queries", "contexts", "gates")
    kernels, biases = (tuple(f"{ours}/{part}/{leaf}" for part in split) for leaf in ("kernel", "bias"))
    rows: list[n.Row] = [
        n.Name(f"{theirs}.{inner}.weight", kernels, into),
        n.Name(f"{theirs}.{inner}.bias", biases),
    ]
    rows += linear(f"{theirs}.{modulator}", f"{ours}/modulator", middle)
    rows += linear(f"{theirs}.{outer}", f"{ours}/projection", out)
    for level in range(mixer.levels):
        kernel = f"{ours}/levels_{level}/kernel"
        rows.append(n.Name(f"{theirs}.focal_layers.{level}.0.weight", kernel, n.DEPTHWISE))
    return rows + norm_rows(f"{theirs}.{norm}", f"{ours}/norm", "layer") if mixer.norm else rows


_SMALL: dict[str, Any] = dict(depths=(2, 2, 18, 2))
_LRF: dict[str, Any] = dict(focal_levels=(3, 3, 3, 3))
_LARGE: dict[str, Any] = dict(_SMALL, use_post_norm=True, use_overlap_down=True, layerscale_value=1e-4)
_LARGE |= dict(num_classes=21842)
_FL3: dict[str, Any] = dict(_LARGE, focal_levels=(3, 3, 3, 3), focal_windows=(5, 5, 5, 5))
_FL4: dict[str, Any] = dict(_LARGE, focal_levels=(4, 4, 4, 4))
_HUGE: dict[str, Any] = dict(embed_dim=352, use_post_norm_in_modulation=True)
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "focalnet_tiny_srf": {},
    "focalnet_small_srf": _SMALL,
    "focalnet_base_srf": dict(_SMALL, embed_dim=128),
    "focalnet_tiny_lrf": _LRF,
    "focalnet_small_lrf": dict(_SMALL, **_LRF),
    "focalnet_base_lrf": dict(_SMALL, embed_dim=128, **_LRF),
    "focalnet_large_fl3": dict(_FL3, embed_dim=192),
    "focalnet_large_fl4": dict(_FL4, embed_dim=192),
    "focalnet_xlarge_fl3": dict(_FL3, embed_dim=256),
    "focalnet_xlarge_fl4": dict(_FL4, embed_dim=256),
    "focalnet_huge_fl3": dict(
        _FL3,
        **_HUGE,
    )
    | dict(focal_windows=(3, 3, 3, 3)),
    "focalnet_huge_fl4": dict(_FL4, **_HUGE) | dict(num_classes=0),
}
TIMM = {name: Family(build, names, inputs, sizes) for name, sizes in ARCHITECTURES.items()}
