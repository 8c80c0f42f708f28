"""timm's PoolFormer.

Its head differs from the paper's: the maps are pooled first, and a layer norm over channels stands behind.
Left out are the networks of a later paper with learned activations and residual scales (`poolformerv2`,
`convformer`, `caformer`).

Source of names, defaults and shapes: timm 1.0.31, `timm/models/metaformer.py`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effjax.config import build as build_section
from effjax.ffn.mlp import MLP
from effjax.interop import names as n
from effjax.interop.families.vit import linear, norm_rows
from effjax.interop.family import Family
from effjax.layers.conv import ConvNorm
from effjax.layers.downsample import Convs
from effjax.mixers.pooling import Pooling
from effjax.models.blocks.metaformer import Block
from effjax.models.heads import Linear
from effjax.models.pyramid import Pyramid, Stage


@dataclasses.dataclass(frozen=True)
class TimmPoolFormer:
    """The keyword arguments of timm that are understood here."""

    in_chans: int = 3
    num_classes: int = 1000
    depths: tuple[int, ...] = (2, 2, 6, 2)
    dims: tuple[int, ...] = (64, 128, 320, 512)
    layer_scale_init_values: float | None = 1e-5
    drop_path_rate: float = 0.0
    pool_size: int = 3


def build(config: Mapping[str, Any]) -> Pyramid:
    """Makes the model from the keyword arguments of `timm.create_model`.

    Raises:
      UsageError: for an argument that is not understood.
    """
    c = build_section(TimmPoolFormer, config, "config")
    return Pyramid(
        stages=tuple(
            Stage(
                depth=depth,
                dim=dim,
                blocks=(block(4 * dim, c.pool_size, c.layer_scale_init_values),),
                downsample=conv(3, 2, 1) if i else None,
            )
            for i, (depth, dim) in enumerate(zip(c.depths, c.dims, strict=True))
        ),
        classes=c.num_classes,
        stem=conv(7, 4, 2),
        head=Linear(norm="layer", place="after_pool", epsilon=1e-6),
        drop_path=c.drop_path_rate,
    )


def block(hidden: int, size: int, scale: float | None, activation: str = "gelu") -> Block:
    """PoolFormer's block."""
    ffn = MLP(hidden=hidden, activation=activation)
    return Block(mixer=Pooling(size), ffn=ffn, epsilon=1e-5, layer_scale=scale, norm="group")


def conv(kernel: int, stride: int, padding: int) -> Convs:
    """A convolution alone, as a stem and between stages."""
    return Convs((ConvNorm(None, kernel, stride, padding, use_bias=True, norm=None),))


def inputs(model: Pyramid, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """One picture; the network is made for all sizes."""
    return (jax.ShapeDtypeStruct((1, 64, 64, config.get("in_chans", 3)), jnp.float32),)


def names(model: Pyramid) -> tuple[n.Row, ...]:
    """The name map."""
    rows = linear("stem.conv", "stem/layers_0/conv", n.CONV)
    for i, stage in enumerate(model.stages):
        theirs, ours = f"stages.{i}", f"stages_{i}"
        if stage.downsample is not None:
            rows += linear(f"{theirs}.downsample.conv", f"{ours}/downsample/layers_0/conv", n.CONV)
        theirs, ours = f"{theirs}.blocks.{{layer}}", f"{ours}/stack"
        rows += norm_rows(f"{theirs}.norm1", f"{ours}/mixer_norm", "layer")
        rows += norm_rows(f"{theirs}.norm2", f"{ours}/ffn_norm", "layer")
        rows += linear(f"{theirs}.mlp.fc1", f"{ours}/ffn/expand", n.POINTWISE)
        rows += linear(f"{theirs}.mlp.fc2", f"{ours}/ffn/contract", n.POINTWISE)
        if stage.blocks[0].layer_scale is not None:
            rows.append(n.Name(f"{theirs}.layer_scale1.scale", f"{ours}/mixer_scale"))
            rows.append(n.Name(f"{theirs}.layer_scale2.scale", f"{ours}/ffn_scale"))
    rows += norm_rows("head.norm", "head/norm", "layer")
    return (*rows, *linear("head.fc", "head/classifier", classifier=True))


_MEDIUM = (96, 192, 384, 768)
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "poolformer_s12": {},
    "poolformer_s24": dict(depths=(4, 4, 12, 4)),
    "poolformer_s36": dict(depths=(6, 6, 18, 6), layer_scale_init_values=1e-6),
    "poolformer_m36": dict(depths=(6, 6, 18, 6), dims=_MEDIUM, layer_scale_init_values=1e-6),
    "poolformer_m48": dict(depths=(8, 8, 24, 8), dims=_MEDIUM, layer_scale_init_values=1e-6),
}
TIMM = {name: Family(build, names, inputs, sizes) for name, sizes in ARCHITECTURES.items()}
