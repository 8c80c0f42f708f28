"""timm's ConvNeXt, the first version, and the authors' own checkpoints.

Left out are the two architectures whose norms only divide (`zepto`), and the second version.

Source of names, defaults and shapes: timm 1.0.31, `timm/models/convnext.py`; facebookresearch/ConvNeXt,
`models/convnext.py`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from effjax.config import build as build_section
from effjax.errors import UsageError, did_you_mean
from effjax.ffn.mlp import MLP
from effjax.interop import names as n
from effjax.interop.families.vit import ACTIVATIONS, linear, norm_rows
from effjax.interop.family import Family
from effjax.interop.resize import Patches
from effjax.layers import downsample
from effjax.layers.conv import ConvNorm
from effjax.layers.norms import NormKind
from effjax.mixers.depthwise import Depthwise
from effjax.models.blocks.metaformer import Block
from effjax.models.heads import Linear
from effjax.models.pyramid import Pyramid, Stage

NORMS: dict[str, NormKind] = {
    "layernorm": "layer",
    "layernorm2d": "layer",
    "rmsnorm": "rms",
    "rmsnorm2d": "rms",
}
POOLS: dict[str, Literal["mean", "max"]] = {"avg": "mean", "max": "max"}


@dataclasses.dataclass(frozen=True)
class TimmConvNeXt:
    """The keyword arguments of timm that are understood here, with timm's defaults."""

    in_chans: int = 3
    num_classes: int = 1000
    global_pool: str = "avg"
    depths: tuple[int, ...] = (3, 3, 9, 3)
    dims: tuple[int, ...] = (96, 192, 384, 768)
    kernel_sizes: int | tuple[int, ...] = 7
    ls_init_value: float | None = 1e-6
    stem_type: Literal["patch", "overlap", "overlap_tiered", "overlap_act"] = "patch"
    patch_size: int = 4
    head_norm_first: bool = False
    head_hidden_size: int | None = None
    conv_mlp: bool = False
    act_layer: str = "gelu"
    norm_layer: str | None = None
    norm_eps: float | None = None
    drop_path_rate: float = 0.0


def build(config: Mapping[str, Any]) -> Pyramid:
    """Makes the model from the keyword arguments of `timm.create_model`.

    Raises:
      UsageError: for an argument that is not understood.
    """
    c = build_section(TimmConvNeXt, config, "config")
    kind, epsilon = _among(NORMS, c.norm_layer or "layernorm", "norm_layer"), c.norm_eps or 1e-6
    act = _among(ACTIVATIONS, c.act_layer, "act_layer")
    kernels = (c.kernel_sizes,) * len(c.depths) if isinstance(c.kernel_sizes, int) else tuple(c.kernel_sizes)
    return Pyramid(
        stages=tuple(
            Stage(
                depth=depth,
                dim=dim,
                blocks=(block(dim, kernel, act, c.ls_init_value, kind, epsilon),),
                # The stem of patches of two leaves a halving to the first stage.
                downsample=halve(kind, epsilon)
                if i or (c.stem_type == "patch" and c.patch_size == 2)
                else None,
            )
            for i, (depth, dim, kernel) in enumerate(zip(c.depths, c.dims, kernels, strict=True))
        ),
        classes=c.num_classes,
        stem=_stem(c, kind, epsilon, act),
        head=Linear(
            norm=kind,
            place="before_pool" if c.head_norm_first else "after_pool",
            epsilon=epsilon,
            pool=_among(POOLS, c.global_pool, "global_pool"),
            hidden=c.head_hidden_size,
        ),
        drop_path=c.drop_path_rate,
    )


def block(dim: int, kernel: int, act: str, scale: float | None, kind: NormKind, epsilon: float) -> Block:
    """ConvNeXt's block."""
    return Block(
        mixer=Depthwise(kernel),
        ffn=MLP(hidden=4 * dim, activation=act),
        epsilon=epsilon,
        layer_scale=scale,
        norm=kind,
        order="one_branch",
    )


def halve(kind: NormKind, epsilon: float) -> downsample.Patches:
    """What stands between its stages."""
    return downsample.Patches(2, norm=kind, norm_first=True, epsilon=epsilon, edge="crop")


def _stem(c: TimmConvNeXt, kind: NormKind, epsilon: float, act: str) -> Any:
    if c.stem_type == "patch":
        return downsample.Patches(c.patch_size, norm=kind, epsilon=epsilon, edge="crop")
    middle = c.dims[0]
    if c.stem_type == "overlap_tiered":  # half as many channels, as a multiple of eight within a tenth
        middle = max(8, (c.dims[0] // 2 + 4) // 8 * 8)
        middle += 8 if middle < 0.9 * (c.dims[0] // 2) else 0
    between = act if c.stem_type == "overlap_act" else None
    first = ConvNorm(middle, 3, 2, use_bias=True, norm=None, activation=between)
    return downsample.Convs((first, ConvNorm(None, 3, 2, use_bias=True, norm=kind, epsilon=epsilon)))


def _among(table: Mapping[str, Any], value: str, argument: str) -> Any:
    if value not in table:
        raise UsageError(f"config.{argument} is {value!r}. {did_you_mean(value, table)}")
    return table[value]


def inputs(model: Pyramid, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """One picture; the network is made for all sizes."""
    return (jax.ShapeDtypeStruct((1, 64, 64, config.get("in_chans", 3)), jnp.float32),)


def names(model: Pyramid) -> tuple[n.Row, ...]:
    """The name map of timm's ConvNeXt whose FFNs are projections."""
    return _names(model, n.LINEAR)


def _convolved_names(model: Pyramid) -> tuple[n.Row, ...]:
    return _names(model, n.POINTWISE)


def _names(model: Pyramid, layout: str) -> tuple[n.Row, ...]:
    rows = _stem_rows(model)
    for i, stage in enumerate(model.stages):
        theirs, ours = f"stages.{i}", f"stages_{i}"
        kind = stage.blocks[0].norm
        if stage.downsample is not None:
            rows += norm_rows(f"{theirs}.downsample.0", f"{ours}/downsample/norm", kind)
            rows += patch_rows(f"{theirs}.downsample.1", f"{ours}/downsample", 2)
        theirs, ours = f"{theirs}.blocks.{{layer}}", f"{ours}/stack"
        rows += linear(f"{theirs}.conv_dw", f"{ours}/mixer/conv", n.DEPTHWISE)
        rows += norm_rows(f"{theirs}.norm", f"{ours}/norm", kind)
        rows += linear(f"{theirs}.mlp.fc1", f"{ours}/ffn/expand", layout)
        rows += linear(f"{theirs}.mlp.fc2", f"{ours}/ffn/contract", layout)
        if stage.blocks[0].layer_scale is not None:
            rows.append(n.Name(f"{theirs}.gamma", f"{ours}/scale"))
    before = model.head.place == "before_pool"
    rows += norm_rows("norm_pre" if before else "head.norm", "head/norm", model.head.norm)
    if model.head.hidden:
        rows += linear("head.pre_logits.fc", "head/hidden")
    return (*rows, *linear("head.fc", "head/classifier", classifier=True))


def _stem_rows(model: Pyramid) -> list[n.Row]:
    if isinstance(model.stem, downsample.Patches):
        rows = patch_rows("stem.0", "stem", model.stem.patch)
        return rows + norm_rows("stem.1", "stem/norm", model.stem.norm)
    first, second = model.stem.layers
    at = 2 if first.activation else 1
    rows = linear("stem.0", "stem/layers_0/conv", n.CONV) + linear(f"stem.{at}", "stem/layers_1/conv", n.CONV)
    return rows + norm_rows(f"stem.{at + 1}", "stem/layers_1/norm", second.norm)


def patch_rows(theirs: str, ours: str, patch: int) -> list[n.Row]:
    """The rows of patches that do not overlap."""
    kernel, sizes = f"{ours}/embed/projection/kernel", {"p": patch, "q": patch}
    return [
        n.Name(f"{theirs}.weight", kernel, n.PATCHES, sizes, resize=Patches()),
        n.Name(f"{theirs}.bias", f"{ours}/embed/projection/bias"),
    ]


# The names in the authors' checkpoints, which other libraries' conversions start from.
OFFICIAL = (
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv(\d)\.", r".mlp.fc\1."),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def _timm(sizes: Mapping[str, Any]) -> Family:
    spell = _convolved_names if sizes.get("conv_mlp") else names
    return Family(build, spell, inputs, sizes, renames=OFFICIAL)


_SMALL: dict[str, Any] = dict(depths=(2, 2, 6, 2), conv_mlp=True)
_NANO: dict[str, Any] = dict(_SMALL, depths=(2, 2, 8, 2))
_TINY: dict[str, Any] = dict(depths=(3, 3, 9, 3))
_DEEP: dict[str, Any] = dict(depths=(3, 3, 27, 3))
_TEST: dict[str, Any] = dict(depths=(1, 1, 1, 1), dims=(32, 64, 96, 128), norm_eps=1e-5)
_TIERED, _RMS = dict(stem_type="overlap_tiered"), dict(norm_layer="rmsnorm2d")


def _widths(first: int) -> tuple[int, ...]:
    return (first, 2 * first, 4 * first, 8 * first)


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "convnext_atto": dict(_SMALL, dims=_widths(40)),
    "convnext_atto_ols": dict(_SMALL, dims=_widths(40), **_TIERED),
    "convnext_atto_rms": dict(_SMALL, dims=_widths(40), **_RMS),
    "convnext_femto": dict(_SMALL, dims=_widths(48)),
    "convnext_femto_ols": dict(_SMALL, dims=_widths(48), **_TIERED),
    "convnext_pico": dict(_SMALL, dims=_widths(64)),
    "convnext_pico_ols": dict(_SMALL, dims=_widths(64), **_TIERED),
    "convnext_nano": dict(_NANO, dims=_widths(80)),
    "convnext_nano_ols": dict(_NANO, dims=_widths(80), stem_type="overlap"),
    "convnext_tiny_hnf": dict(_TINY, dims=_widths(96), conv_mlp=True, head_norm_first=True),
    "convnext_tiny": dict(_TINY, dims=_widths(96)),
    "convnext_small": dict(_DEEP, dims=_widths(96)),
    "convnext_base": dict(_DEEP, dims=_widths(128)),
    "convnext_large": dict(_DEEP, dims=_widths(192)),
    "convnext_large_mlp": dict(_DEEP, dims=_widths(192), head_hidden_size=1536),
    "convnext_xlarge": dict(_DEEP, dims=_widths(256)),
    "convnext_xxlarge": dict(depths=(3, 4, 30, 3), dims=_widths(384), norm_eps=1e-5),
    "test_convnext": dict(depths=(1, 2, 4, 2), dims=(24, 32, 48, 64), norm_eps=1e-5, act_layer="gelu_tanh"),
    "test_convnext2": dict(_TEST, act_layer="gelu_tanh"),
    "test_convnext3": dict(_TEST, act_layer="silu", kernel_sizes=(7, 5, 5, 3)),
}
TIMM = {name: _timm(sizes) for name, sizes in ARCHITECTURES.items()}
