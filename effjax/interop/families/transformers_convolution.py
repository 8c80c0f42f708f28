"""transformers' convolutional backbones: ConvNext, PoolFormer and FocalNet, classifiers and bare models.

A bare PoolFormer hands out maps without its last norm, which no model here does, and is refused.

Source of names, defaults and shapes: transformers 5.23, `models/{convnext,poolformer,focalnet}/*.py`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effjax.errors import UsageError
from effjax.interop import names as n
from effjax.interop.families import classifiers, timm_convnext, timm_focalnet, timm_poolformer
from effjax.interop.families.activations import ours as activation
from effjax.interop.families.timm_convnext import patch_rows
from effjax.interop.families.vit import linear, norm_rows
from effjax.interop.family import Family
from effjax.layers.downsample import Patches
from effjax.models.heads import Linear
from effjax.models.pyramid import Pyramid, Stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvNextConfig(classifiers.Classifier):
    """What is read of a configuration, with its defaults."""

    patch_size: int = 4
    hidden_sizes: tuple[int, ...] = (96, 192, 384, 768)
    depths: tuple[int, ...] = (3, 3, 9, 3)
    layer_norm_eps: float = 1e-12
    layer_scale_init_value: float = 1e-6
    drop_path_rate: float = 0.0


def convnext(config: Mapping[str, Any]) -> Pyramid:
    """Makes a ConvNeXt; `layer_norm_eps` is that of the last norm alone."""
    c = classifiers.read(ConvNextConfig, config)
    act, scale = activation(c.hidden_act), c.layer_scale_init_value or None
    return Pyramid(
        stages=tuple(
            Stage(
                depth=depth,
                dim=dim,
                blocks=(timm_convnext.block(dim, 7, act, scale, "layer", 1e-6),),
                downsample=timm_convnext.halve("layer", 1e-6) if i else None,
            )
            for i, (depth, dim) in enumerate(zip(c.depths, c.hidden_sizes, strict=True))
        ),
        classes=c.classes,
        stem=Patches(c.patch_size, edge="crop"),
        head=Linear(place="after_pool", epsilon=c.layer_norm_eps),
        drop_path=c.drop_path_rate,
    )


def convnext_names(model: Pyramid) -> tuple[n.Row, ...]:
    """The name map of ConvNext."""
    prefix = _prefix("convnext", model)
    rows = patch_rows(f"{prefix}embeddings.patch_embeddings", "stem", model.stem.patch)
    rows += norm_rows(f"{prefix}embeddings.layernorm", "stem/norm", "layer")
    for i, stage in enumerate(model.stages):
        theirs, ours = f"{prefix}encoder.stages.{i}", f"stages_{i}"
        if stage.downsample is not None:
            rows += norm_rows(f"{theirs}.downsampling_layer.0", f"{ours}/downsample/norm", "layer")
            rows += patch_rows(f"{theirs}.downsampling_layer.1", f"{ours}/downsample", 2)
        theirs, ours = f"{theirs}.layers.{{layer}}", f"{ours}/stack"
        rows += linear(f"{theirs}.dwconv", f"{ours}/mixer/conv", n.DEPTHWISE)
        rows += norm_rows(f"{theirs}.layernorm", f"{ours}/norm", "layer")
        rows += linear(f"{theirs}.pwconv1", f"{ours}/ffn/expand")
        rows += linear(f"{theirs}.pwconv2", f"{ours}/ffn/contract")
        if stage.blocks[0].layer_scale is not None:
            rows.append(n.Name(f"{theirs}.layer_scale_parameter", f"{ours}/scale"))
    rows += norm_rows(f"{prefix}layernorm", "head/norm", "layer")
    return (*rows, *linear("classifier", "head/classifier", classifier=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolFormerConfig(classifiers.Classifier):
    """What is read of a configuration, with its defaults."""

    pool_size: int = 3
    mlp_ratio: float = 4.0
    depths: tuple[int, ...] = (2, 2, 6, 2)
    hidden_sizes: tuple[int, ...] = (64, 128, 320, 512)
    patch_sizes: tuple[int, ...] = (7, 3, 3, 3)
    strides: tuple[int, ...] = (4, 2, 2, 2)
    padding: tuple[int, ...] = (2, 1, 1, 1)
    use_layer_scale: bool = True
    layer_scale_init_value: float = 1e-5
    drop_path_rate: float = 0.0


def poolformer(config: Mapping[str, Any]) -> Pyramid:
    """Makes a PoolFormer.

    Raises:
      UsageError: for a bare model.
    """
    c = classifiers.read(PoolFormerConfig, config)
    if not c.classes:
        raise UsageError("a PoolFormer without a classifier has no last norm: give a classifier's weights.")
    scale = c.layer_scale_init_value if c.use_layer_scale else None
    act = activation(c.hidden_act)
    convs = [timm_poolformer.conv(*size) for size in zip(c.patch_sizes, c.strides, c.padding, strict=True)]
    return Pyramid(
        stages=tuple(
            Stage(
                depth=depth,
                dim=dim,
                blocks=(timm_poolformer.block(int(dim * c.mlp_ratio), c.pool_size, scale, act),),
                downsample=convs[i] if i else None,
            )
            for i, (depth, dim) in enumerate(zip(c.depths, c.hidden_sizes, strict=True))
        ),
        classes=c.classes,
        stem=convs[0],
        head=Linear(norm="group", epsilon=1e-5),
        drop_path=c.drop_path_rate,
    )


def poolformer_names(model: Pyramid) -> tuple[n.Row, ...]:
    """The name map of PoolFormer."""
    rows: list[n.Row] = []
    for i, stage in enumerate(model.stages):
        embed = f"stages_{i}/downsample" if i else "stem"
        theirs = f"poolformer.encoder.patch_embeddings.{i}.projection"
        rows += linear(theirs, f"{embed}/layers_0/conv", n.CONV)
        theirs, ours = f"poolformer.encoder.block.{i}.{{layer}}", f"stages_{i}/stack"
        rows += norm_rows(f"{theirs}.before_norm", f"{ours}/mixer_norm", "layer")
        rows += norm_rows(f"{theirs}.after_norm", f"{ours}/ffn_norm", "layer")
        rows += linear(f"{theirs}.output.conv1", f"{ours}/ffn/expand", n.POINTWISE)
        rows += linear(f"{theirs}.output.conv2", f"{ours}/ffn/contract", n.POINTWISE)
        if stage.blocks[0].layer_scale is not None:
            rows.append(n.Name(f"{theirs}.layer_scale_1", f"{ours}/mixer_scale"))
            rows.append(n.Name(f"{theirs}.layer_scale_2", f"{ours}/ffn_scale"))
    rows += norm_rows("norm", "head/norm", "layer")
    return (*rows, *linear("classifier", "head/classifier", classifier=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FocalNetConfig(classifiers.Classifier):
    """What is read of a configuration, with its defaults."""

    patch_size: int = 4
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    focal_levels: tuple[int, ...] = (2, 2, 2, 2)
    focal_windows: tuple[int, ...] = (3, 3, 3, 3)
    mlp_ratio: float = 4.0
    use_conv_embed: bool = False
    use_layerscale: bool = False
    layerscale_value: float = 1e-4
    use_post_layernorm: bool = False
    use_post_layernorm_in_modulation: bool = False
    normalize_modulator: bool = False
    hidden_dropout_prob: float = 0.0
    drop_path_rate: float = 0.1
    layer_norm_eps: float = 1e-5


def focalnet(config: Mapping[str, Any]) -> Pyramid:
    """Makes a FocalNet.

    Raises:
      UsageError: for dropout, which is none of the modulation's fields.
    """
    c = classifiers.read(FocalNetConfig, config)
    if c.hidden_dropout_prob:
        raise UsageError(f"config.hidden_dropout_prob is {c.hidden_dropout_prob}: there is no dropout here.")
    parts = timm_focalnet.TimmFocalNet(
        embed_dim=c.embed_dim,
        depths=c.depths,
        mlp_ratio=c.mlp_ratio,
        focal_levels=c.focal_levels,
        focal_windows=c.focal_windows,
        use_overlap_down=c.use_conv_embed,
        use_post_norm=c.use_post_layernorm,
        use_post_norm_in_modulation=c.use_post_layernorm_in_modulation,
        normalize_modulator=c.normalize_modulator,
        layerscale_value=c.layerscale_value if c.use_layerscale else None,
        drop_path_rate=c.drop_path_rate,
    )
    act = activation(c.hidden_act)
    return timm_focalnet.focalnet(parts, c.classes, "pad", c.patch_size, c.layer_norm_eps, act)


def focalnet_names(model: Pyramid) -> tuple[n.Row, ...]:
    """The name map of FocalNet, whose stages end with what makes the map coarser."""
    prefix = _prefix("focalnet", model)
    embeddings = f"{prefix}embeddings"
    rows = timm_focalnet.embed_rows(
        model.stem, f"{embeddings}.patch_embeddings.projection", f"{embeddings}.norm", "stem"
    )
    for i, stage in enumerate(model.stages):
        if stage.downsample is not None:
            theirs = f"{prefix}encoder.stages.{i - 1}.downsample"
            rows += timm_focalnet.embed_rows(
                stage.downsample, f"{theirs}.projection", f"{theirs}.norm", f"stages_{i}/downsample"
            )
        theirs, ours = f"{prefix}encoder.stages.{i}.layers.{{layer}}", f"stages_{i}/stack"
        block = stage.blocks[0]
        rows += norm_rows(f"{theirs}.norm1", f"{ours}/mixer_norm", "layer")
        rows += norm_rows(f"{theirs}.norm2", f"{ours}/ffn_norm", "layer")
        parts = {
            "projection_in": n.LINEAR,
            "projection_context": n.POINTWISE,
            "projection_out": n.LINEAR,
        }
        rows += timm_focalnet.modulation_rows(
            f"{theirs}.modulation", f"{ours}/mixer", block.mixer, parts, "layernorm"
        )
        rows += linear(f"{theirs}.mlp.fc1", f"{ours}/ffn/expand")
        rows += linear(f"{theirs}.mlp.fc2", f"{ours}/ffn/contract")
        if block.layer_scale is not None:
            rows.append(n.Name(f"{theirs}.gamma_1", f"{ours}/mixer_scale"))
            rows.append(n.Name(f"{theirs}.gamma_2", f"{ours}/ffn_scale"))
    rows += norm_rows(f"{prefix}layernorm", "head/norm", "layer")
    return (*rows, *linear("classifier", "head/classifier", classifier=True))


def _prefix(base: str, model: Pyramid) -> str:
    """A classifier holds its encoder under a name; a bare model is the encoder."""
    return f"{base}." if model.classes else ""


def inputs(model: Pyramid, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """One picture; the networks are made for all sizes."""
    return (jax.ShapeDtypeStruct((1, 64, 64, config.get("num_channels", 3)), jnp.float32),)


TRANSFORMERS = {
    name: Family(build, names, inputs, complete=classifiers.complete)
    for name, build, names in (
        ("convnext", convnext, convnext_names),
        ("poolformer", poolformer, poolformer_names),
        ("focalnet", focalnet, focalnet_names),
    )
}
