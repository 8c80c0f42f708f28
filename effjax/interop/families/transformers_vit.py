"""transformers' vision encoders: ViT, DeiT, ViT-MSN, I-JEPA, DINOv2 (also with registers), CLIP, SigLIP.

One configuration serves several classes. `architectures` says which; without it the names of the tensors do.
The files and, since version 5, the modules spell the same parameters differently; both are read, and files
are what is written.

Source of names, defaults and shapes: transformers 5.23, `models/*/modeling_*.py`, `configuration_*.py` and
`conversion_mapping.py`.
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from effjax.config import build as build_section
from effjax.errors import UsageError, did_you_mean
from effjax.ffn.gated import Gated
from effjax.ffn.mlp import MLP
from effjax.interop import names as n
from effjax.interop.families.vit import TOKEN, halves, linear, norm_rows, patch_rows
from effjax.interop.family import Family
from effjax.mixers.attention import Attention
from effjax.models.blocks.metaformer import Block
from effjax.models.vit import ViT

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """What is read of a configuration; the defaults of `ViTConfig`."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    mlp_ratio: float = 4.0
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    drop_path_rate: float = 0.0
    layer_norm_eps: float = 1e-12
    image_size: int | tuple[int, ...] = 224
    patch_size: int | tuple[int, ...] = 16
    num_channels: int = 3
    qkv_bias: bool = True
    layerscale_value: float = 1.0
    use_swiglu_ffn: bool = False
    use_mask_token: bool = True
    num_register_tokens: int = 4
    pooler_output_size: int | None = None
    pooler_act: str = "tanh"
    num_labels: int | None = None
    id2label: dict[str, Any] | None = None
    architectures: tuple[str, ...] | None = None
    model_type: str = ""
    add_pooling_layer: bool = True
    """No key of theirs but an argument of the class; the names of the tensors say it."""


def read(config: Mapping[str, Any]) -> VisionConfig:
    """Reads the keys that matter here; a configuration has many that do not."""
    keys = [field.name for field in dataclasses.fields(VisionConfig)]
    section = {key: config[key] for key in keys if config.get(key) is not None}
    if "id2label" in section:
        section["id2label"] = {str(key): value for key, value in section["id2label"].items()}
    return build_section(VisionConfig, section, "config")


def complete(config: Mapping[str, Any], tensors: Collection[str]) -> Mapping[str, Any]:
    """Says which class the tensors belong to, and whether they have a pooler."""
    found: dict[str, Any] = {"add_pooling_layer": any(name.startswith("pooler.") for name in tensors)}
    if not config.get("architectures"):
        kind = "Model"
        if any(name.startswith("cls_classifier.") for name in tensors):
            kind = "ForImageClassificationWithTeacher"
        elif any(name.startswith("classifier.") for name in tensors):
            kind = "ForImageClassification"
        found["architectures"] = (kind,)
    found["use_mask_token"] = any(name.endswith("embeddings.mask_token") for name in tensors)
    return {**config, **found}


def build(config: Mapping[str, Any]) -> ViT:
    """Makes the model of a configuration.

    Raises:
      UsageError: for what has no counterpart here: dropout of attention weights, other activations, other
        classes.
    """
    c = read(config)
    if c.attention_probs_dropout_prob:
        raise UsageError("attention_probs_dropout_prob must be 0: attention weights are not dropped.")
    architecture = c.architectures[0] if c.architectures else "ForImageClassification"
    classifies, teacher = "ForImageClassification" in architecture, architecture.endswith("WithTeacher")
    if not classifies and not architecture.endswith("Model"):
        raise UsageError(
            f"config.architectures is {architecture!r}: a classifier or a bare model is read here."
        )
    labels = 2 if c.id2label is None else len(c.id2label)
    options: dict[str, Any] = {}
    if not classifies and c.add_pooling_layer and c.model_type in ("vit", "deit"):
        if c.pooler_act != "tanh":
            raise UsageError(f"config.pooler_act is {c.pooler_act!r}; 'tanh' is what is understood here.")
        options["representation"] = c.pooler_output_size or c.hidden_size
    if c.model_type == "deit":  # without a teacher its second token is mixed and not read
        options.update(distillation=True) if teacher else options.update(registers=1)
    if c.model_type == "ijepa":
        options.update(class_token=False, pool="mean" if classifies else "none")
    if c.model_type.startswith("dinov2"):
        options.update(mask_token=c.use_mask_token, pool="token_mean" if classifies else "token")
    if c.model_type == "dinov2_with_registers":
        options.update(registers=c.num_register_tokens, positioned="class_and_patches")
    return ViT(
        block=_block(c),
        patch=_side(c.patch_size),
        dim=c.hidden_size,
        depth=c.num_hidden_layers,
        classes=(labels if c.num_labels is None else c.num_labels) if classifies else 0,
        drop_path=c.drop_path_rate,
        dropout=c.hidden_dropout_prob,
        crop=True,
        **options,
    )


def _block(c: VisionConfig) -> Block:
    if c.hidden_act not in ACTIVATIONS:
        raise UsageError(f"config.hidden_act is {c.hidden_act!r}. {did_you_mean(c.hidden_act, ACTIVATIONS)}")
    dino = c.model_type.startswith("dinov2")
    hidden = int(c.hidden_size * c.mlp_ratio) if dino else c.intermediate_size or 3072
    ffn: nn.Module = MLP(hidden=hidden, activation=ACTIVATIONS[c.hidden_act])
    if dino and c.use_swiglu_ffn:
        ffn = Gated(hidden=(int(hidden * 2 / 3) + 7) // 8 * 8, use_bias=True)
    return Block(
        mixer=Attention(heads=c.num_attention_heads, qkv_bias=c.qkv_bias),
        ffn=ffn,
        epsilon=c.layer_norm_eps,
        dropout=0.0 if dino else c.hidden_dropout_prob,
        layer_scale=c.layerscale_value if dino else None,
    )


def _side(size: int | tuple[int, ...]) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise UsageError(f"config.patch_size is {size}: patches are square here.")
    return sides.pop()


def inputs(model: ViT, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """One picture of the configured size."""
    c = read(config)
    height, width = (c.image_size, c.image_size) if isinstance(c.image_size, int) else c.image_size
    return (jax.ShapeDtypeStruct((1, height, width, c.num_channels), jnp.float32),)


@dataclasses.dataclass(frozen=True)
class Spelling:
    """How the parts of a layer are called.

    Attributes:
      layer: of a layer.
      attention: of query, key, value and output.
      norms: of the first and the second norm.
      expand, contract: of an FFN of two matrices.
      gated: of a gated FFN: gate, value and output, or the first two in one and the output.
    """

    layer: str
    attention: tuple[str, ...]
    norms: tuple[str, ...]
    expand: str
    contract: str
    gated: tuple[str, ...] = ()


_HEADS_IN_FILES = (f"attention.attention.{part}" for part in ("query", "key", "value"))
_IN_FILES = (*_HEADS_IN_FILES, "attention.output.dense")
_IN_MODULES = tuple(f"attention.{part}_proj" for part in "qkvo")
_LAYER, _NORMS, _NORMS_DINO = (
    "encoder.layer.{layer}",
    ("layernorm_before", "layernorm_after"),
    ("norm1", "norm2"),
)

FILES = Spelling(_LAYER, _IN_FILES, _NORMS, "intermediate.dense", "output.dense")
MODULES = Spelling("layers.{layer}", _IN_MODULES, _NORMS, "mlp.fc1", "mlp.fc2")
_GATED_FILES, _GATED_MODULES = ("weights_in", "weights_out"), ("gate_proj", "up_proj", "down_proj")
DINO_FILES = Spelling(_LAYER, _IN_FILES, _NORMS_DINO, "mlp.fc1", "mlp.fc2", _GATED_FILES)
DINO_MODULES = Spelling(_LAYER, _IN_MODULES, _NORMS_DINO, "mlp.fc1", "mlp.fc2", _GATED_MODULES)


def names(
    model: ViT, base: str, spelling: Spelling, bare: bool = False, bare_layers: bool = False
) -> tuple[n.Row, ...]:
    """The name map of a class: `base` is its attribute that holds the encoder, unless it is the encoder.

    Args:
      model: the model.
      base: prefix of the encoder within a classifier.
      spelling: of a layer.
      bare: whether the model is an encoder by itself; so is every model without a classifier.
      bare_layers: whether the layers lack the prefix that the rest has, as in files of ViT-MSN from 5.23.
    """
    prefix = "" if bare or not model.classes else f"{base}."
    embeddings = f"{prefix}embeddings"
    rows = patch_rows(model, f"{embeddings}.patch_embeddings.projection", f"{embeddings}.position_embeddings")
    # DeiT without a teacher has the distillation token as one that nobody reads.
    registers = "register_tokens" if model.positioned == "class_and_patches" else "distillation_token"
    if model.has_class_token:
        rows.append(n.Name(f"{embeddings}.cls_token", "class_token", TOKEN))
    if model.distillation:
        rows.append(n.Name(f"{embeddings}.distillation_token", "distillation_token", TOKEN))
    if model.registers:
        rows.append(n.Name(f"{embeddings}.{registers}", "registers", TOKEN))
    if model.mask_token:
        rows.append(n.Name(f"{embeddings}.mask_token", "mask_token"))
    rows += _layer_rows(model.block, ("" if bare_layers else prefix) + spelling.layer, spelling)
    rows += norm_rows(f"{prefix}layernorm", "norm", "layer")
    if model.representation:
        rows += linear(f"{prefix}pooler.dense", "representation")
    if not model.distillation:
        return (*rows, *linear("classifier", "head", classifier=True))
    rows += linear("cls_classifier", "head", classifier=True)
    return (*rows, *linear("distillation_classifier", "distillation_head", classifier=True))


def _layer_rows(block: Block, theirs: str, spelling: Spelling) -> list[n.Row]:
    rows: list[n.Row] = []
    for part, ours in zip(spelling.norms, ("mixer_norm", "ffn_norm"), strict=True):
        rows += norm_rows(f"{theirs}.{part}", f"blocks/{ours}", "layer")
    *heads, output = spelling.attention
    for part, ours in zip(heads, ("query", "key", "value"), strict=True):
        rows += linear(f"{theirs}.{part}", f"blocks/mixer/{ours}", n.HEADS_IN, block.mixer.qkv_bias)
    rows += linear(f"{theirs}.{output}", "blocks/mixer/output", n.HEADS_OUT)
    if isinstance(block.ffn, MLP):
        rows += linear(f"{theirs}.{spelling.expand}", "blocks/ffn/expand")
        rows += linear(f"{theirs}.{spelling.contract}", "blocks/ffn/contract")
    else:
        *first, last = (f"{theirs}.mlp.{part}" for part in spelling.gated)
        gate, expand = "blocks/ffn/gate", "blocks/ffn/expand"
        if len(first) == 1:
            rows += halves(first[0], (gate, expand), bias=True)
        else:
            rows += linear(first[0], gate) + linear(first[1], expand)
        rows += linear(last, "blocks/ffn/contract")
    if block.layer_scale is not None:
        rows.append(n.Name(f"{theirs}.layer_scale1.lambda1", "blocks/mixer_scale"))
        rows.append(n.Name(f"{theirs}.layer_scale2.lambda1", "blocks/ffn_scale"))
    return rows


def _family(kind: str, base: str, spellings: tuple[Spelling, ...], **defaults: Any) -> Family:
    first, *others = (
        functools.partial(names, base=base, spelling=spelling, bare=bare)
        for spelling in spellings
        for bare in (False, True)
    )
    others.append(functools.partial(names, base=base, spelling=spellings[0], bare_layers=True))
    defaults["model_type"] = kind
    return Family(build, first, inputs, defaults, spellings=tuple(others), complete=complete)


_PLAIN, _DINO = (FILES, MODULES), (DINO_FILES, DINO_MODULES)

TRANSFORMERS: dict[str, Family] = {
    "vit": _family("vit", "vit", _PLAIN),
    "deit": _family("deit", "deit", _PLAIN),
    "vit_msn": _family("vit_msn", "vit", _PLAIN, layer_norm_eps=1e-6),
    "ijepa": _family("ijepa", "ijepa", _PLAIN),
    "dinov2": _family("dinov2", "dinov2", _DINO, layer_norm_eps=1e-6, patch_size=14),
    "dinov2_with_registers": _family(
        "dinov2_with_registers", "dinov2_with_registers", _DINO, layer_norm_eps=1e-6
    ),
}
