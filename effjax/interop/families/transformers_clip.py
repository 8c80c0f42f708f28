"""transformers' image towers of CLIP and SigLIP.

CLIP has no bias on its patches and a norm before its blocks, and norms the class token alone; SigLIP has no
class token and pools by attention. What comes out is their `pooler_output`.

Source of names, defaults and shapes: transformers 5.23, `models/clip/modeling_clip.py`,
`models/siglip/modeling_siglip.py` and the configurations beside them; before version 5 every name began with
`vision_model.`, and files that were published then do.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effjax.config import build as build_section
from effjax.errors import UsageError, did_you_mean
from effjax.ffn.mlp import MLP
from effjax.interop import names as n
from effjax.interop.families.transformers_vit import ACTIVATIONS
from effjax.interop.families.vit import linear, norm_rows
from effjax.interop.family import Family
from effjax.interop.resize import Patches, Positions
from effjax.layers.pool import AttentionPool
from effjax.mixers.attention import Attention
from effjax.models.blocks.metaformer import Block
from effjax.models.vit import ViT


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """What is read of a configuration; the defaults of `CLIPVisionConfig`."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0
    vision_use_head: bool = True
    model_type: str = "clip_vision_model"


def read(config: Mapping[str, Any]) -> TowerConfig:
    """Reads the keys that matter here; a configuration has many that do not."""
    keys = [field.name for field in dataclasses.fields(TowerConfig)]
    return build_section(TowerConfig, {key: config[key] for key in keys if key in config}, "config")


def build(config: Mapping[str, Any]) -> ViT:
    """Makes the tower of a configuration.

    Raises:
      UsageError: for dropout of attention weights, and for an unknown activation.
    """
    c = read(config)
    if c.hidden_act not in ACTIVATIONS:
        raise UsageError(f"config.hidden_act is {c.hidden_act!r}. {did_you_mean(c.hidden_act, ACTIVATIONS)}")
    if c.attention_dropout:
        raise UsageError("config.attention_dropout must be 0: attention weights are not dropped.")
    ffn = MLP(hidden=c.intermediate_size, activation=ACTIVATIONS[c.hidden_act])
    options: dict[str, Any] = dict(pre_norm=True, patch_bias=False, final_norm="after_pool")
    if c.model_type == "siglip_vision_model":
        options = dict(class_token=False, pool="none")
        if c.vision_use_head:
            options.update(pool=AttentionPool(c.num_attention_heads, ffn.clone(), c.layer_norm_eps))
    return ViT(
        block=Block(Attention(heads=c.num_attention_heads), ffn, c.layer_norm_eps),
        patch=c.patch_size,
        dim=c.hidden_size,
        depth=c.num_hidden_layers,
        classes=0,
        crop=True,
        **options,
    )


def inputs(model: ViT, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """One picture of the configured size."""
    c = read(config)
    return (jax.ShapeDtypeStruct((1, c.image_size, c.image_size, c.num_channels), jnp.float32),)


def names(model: ViT, prefix: str = "") -> tuple[n.Row, ...]:
    """The name map of a tower."""
    embeddings, layer = f"{prefix}embeddings", f"{prefix}encoder.layers.{{layer}}"
    sizes = {"p": model.patch, "q": model.patch}
    resize = Positions(model.patch, prefix=model.positioned_prefix)
    patch = f"{embeddings}.patch_embedding"
    rows: list[n.Row] = [
        n.Ignored(rf"{embeddings}\.position_ids", "numbers the places 0, 1, 2, ..."),
        n.Name(f"{patch}.weight", "embed/projection/kernel", n.PATCHES, sizes, resize=Patches()),
        n.Name(f"{embeddings}.position_embedding.weight", "positions", resize=resize),
    ]
    if model.patch_bias:
        rows.append(n.Name(f"{patch}.bias", "embed/projection/bias"))
    if model.has_class_token:
        rows.append(n.Name(f"{embeddings}.class_embedding", "class_token", "c -> 1 c"))
    if model.pre_norm:
        rows += norm_rows(f"{prefix}pre_layrnorm", "pre_norm", "layer")  # their spelling
    rows += norm_rows(f"{prefix}post_layernorm", "norm", "layer")
    for theirs, ours in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
        rows += linear(f"{layer}.self_attn.{theirs}", f"blocks/mixer/{ours}", n.HEADS_IN)
    rows += linear(f"{layer}.self_attn.out_proj", "blocks/mixer/output", n.HEADS_OUT)
    rows += norm_rows(f"{layer}.layer_norm1", "blocks/mixer_norm", "layer")
    rows += norm_rows(f"{layer}.layer_norm2", "blocks/ffn_norm", "layer")
    rows += _mlp_rows(f"{layer}.mlp", "blocks/ffn")
    return (*rows, *(_head_rows(f"{prefix}head") if isinstance(model.pool, AttentionPool) else []))


def _mlp_rows(theirs: str, ours: str) -> list[n.Row]:
    return linear(f"{theirs}.fc1", f"{ours}/expand") + linear(f"{theirs}.fc2", f"{ours}/contract")


def _head_rows(theirs: str) -> list[n.Row]:
    """SigLIP's attention pooling, with torch's own fused attention."""
    ours = "attention_pool"
    kernels, biases = (
        tuple(f"{ours}/{part}/{leaf}" for part in ("query", "key", "value")) for leaf in ("kernel", "bias")
    )
    rows: list[n.Row] = [
        n.Name(f"{theirs}.probe", f"{ours}/query_token", "1 n c -> n c"),
        n.Name(f"{theirs}.attention.in_proj_weight", kernels, n.FUSED_IN),
        n.Name(f"{theirs}.attention.in_proj_bias", biases, n.FUSED_IN_BIAS),
    ]
    rows += linear(f"{theirs}.attention.out_proj", f"{ours}/output", n.HEADS_OUT)
    rows += norm_rows(f"{theirs}.layernorm", f"{ours}/ffn_norm", "layer")
    return rows + _mlp_rows(f"{theirs}.mlp", f"{ours}/ffn")


def _family(kind: str, **defaults: Any) -> Family:
    before = functools.partial(names, prefix="vision_model.")
    return Family(build, names, inputs, {"model_type": kind, **defaults}, spellings=(before,))


TRANSFORMERS: dict[str, Family] = {
    "clip_vision_model": _family("clip_vision_model"),
    "siglip_vision_model": _family(
        "siglip_vision_model", patch_size=16, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6
    ),
}
