"""transformers' Dinat: DiNAT, and NAT, which is the same without dilation.

transformers runs it with natten alone; the weights are read and written without it. NAT has left
transformers; its files have the same names under another prefix, `nat.`.

Source of names, defaults and shapes: transformers 5.23, `models/dinat/*.py`.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effjax.config import build as build_section
from effjax.errors import UsageError
from effjax.ffn.mlp import MLP
from effjax.interop import names as n
from effjax.interop.families.activations import ours as activation
from effjax.interop.families.stages import stage_rows
from effjax.interop.families.transformers_swin import complete
from effjax.interop.families.vit import linear, norm_rows
from effjax.interop.family import Family
from effjax.layers.conv import ConvNorm
from effjax.layers.downsample import Convs
from effjax.mixers.neighborhood import Neighborhood
from effjax.models.blocks.metaformer import Block
from effjax.models.heads import Linear
from effjax.models.pyramid import Pyramid, Stage

EPSILON = 1e-5  # of the norms outside of blocks and before the head


@dataclasses.dataclass(frozen=True)
class DinatConfig:
    """What is read of a configuration, with its defaults."""

    num_channels: int = 3
    embed_dim: int = 64
    depths: tuple[int, ...] = (3, 4, 6, 5)
    num_heads: tuple[int, ...] = (2, 4, 8, 16)
    kernel_size: int = 7
    dilations: tuple[tuple[int, ...], ...] | None = None
    mlp_ratio: float = 3.0
    qkv_bias: bool = True
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    drop_path_rate: float = 0.1
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    layer_scale_init_value: float = 0.0
    num_labels: int | None = None
    id2label: dict[str, Any] | None = None
    architectures: tuple[str, ...] | None = None
    model_type: str = "dinat"


_DILATIONS = ((1, 8, 1), (1, 4, 1, 4), (1, 2, 1, 2, 1, 2), (1, 1, 1, 1, 1))


def read(config: Mapping[str, Any]) -> DinatConfig:
    """Reads the keys that matter here; a configuration has many that do not."""
    keys = [field.name for field in dataclasses.fields(DinatConfig)]
    section = {key: config[key] for key in keys if config.get(key) is not None}
    if "id2label" in section:
        section["id2label"] = {str(key): value for key, value in section["id2label"].items()}
    return build_section(DinatConfig, section, "config")


def build(config: Mapping[str, Any]) -> Pyramid:
    """Makes the model of a configuration.

    Raises:
      UsageError: for what has no counterpart here: dropout, other classes, dilations that do not repeat.
    """
    c = read(config)
    for key in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        if getattr(c, key):
            raise UsageError(f"config.{key} is {getattr(c, key)}: there is no such thing in this model here.")
    architecture = c.architectures[0] if c.architectures else "ForImageClassification"
    classifies = architecture.endswith("ForImageClassification")
    if not classifies and not architecture.endswith("Model"):
        raise UsageError(
            f"config.architectures is {architecture!r}: a classifier or a bare model is read here."
        )
    labels = 2 if c.id2label is None else len(c.id2label)
    stem = (
        ConvNorm(c.embed_dim // 2, 3, 2, use_bias=True, norm=None),
        ConvNorm(c.embed_dim, 3, 2, use_bias=True, norm="layer", epsilon=EPSILON),
    )
    return Pyramid(
        stages=tuple(_stage(c, i) for i in range(len(c.depths))),
        classes=(labels if c.num_labels is None else c.num_labels) if classifies else 0,
        stem=Convs(layers=stem),
        head=Linear(epsilon=c.layer_norm_eps),
        drop_path=c.drop_path_rate,
    )


def _stage(c: DinatConfig, i: int) -> Stage:
    default = ((1,) * depth for depth in c.depths) if c.model_type == "nat" else _DILATIONS
    dilations = tuple(c.dilations or default)[i]
    dim, repeated = c.embed_dim * 2**i, tuple(dict.fromkeys(dilations))
    if len(dilations) != c.depths[i] or any(
        d != repeated[j % len(repeated)] for j, d in enumerate(dilations)
    ):
        raise UsageError(
            f"config.dilations has {list(dilations)} for {c.depths[i]} blocks: one a block, repeated in turn."
        )

    def block(dilation: int) -> Block:
        return Block(
            mixer=Neighborhood(c.num_heads[i], c.kernel_size, dilation, c.qkv_bias),
            ffn=MLP(hidden=int(c.mlp_ratio * dim), activation=activation(c.hidden_act)),
            epsilon=c.layer_norm_eps,
            layer_scale=c.layer_scale_init_value or None,
        )

    merge = Convs(layers=(ConvNorm(kernel=3, stride=2, norm="layer", epsilon=EPSILON),))
    return Stage(c.depths[i], dim, blocks=tuple(map(block, repeated)), downsample=merge if i else None)


def inputs(model: Pyramid, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """One picture; its size does not matter."""
    return (jax.ShapeDtypeStruct((1, 224, 224, read(config).num_channels), jnp.float32),)


def names(model: Pyramid, base: str) -> tuple[n.Row, ...]:
    """The name map: `base` is a classifier's attribute that holds the encoder; a bare model has none."""
    prefix = f"{base}." if model.classes else ""
    embeddings = f"{prefix}embeddings"
    rows: list[n.Row] = []
    for i in range(2):
        rows += linear(f"{embeddings}.patch_embeddings.projection.{i}", f"stem/layers_{i}/conv", n.CONV)
    rows += norm_rows(f"{embeddings}.norm", "stem/layers_1/norm", "layer")
    for i, stage in enumerate(model.stages):
        levels = f"{prefix}encoder.levels"
        if stage.downsample is not None:
            theirs, ours = f"{levels}.{i - 1}.downsample", f"stages_{i}/downsample/layers_0"
            rows += linear(f"{theirs}.reduction", f"{ours}/conv", n.CONV, bias=False)
            rows += norm_rows(f"{theirs}.norm", f"{ours}/norm", "layer")
        rows += stage_rows(stage, f"stages_{i}", f"{levels}.{i}.layers.{{layer}}", _block_rows)
    rows += norm_rows(f"{prefix}layernorm", "head/norm", "layer")
    return (*rows, *linear("classifier", "head/classifier", classifier=True))


def _block_rows(block: Block, theirs: str, ours: str) -> list[n.Row]:
    attention = f"{theirs}.attention"
    rows = norm_rows(f"{theirs}.layernorm_before", f"{ours}/mixer_norm", "layer")
    rows += norm_rows(f"{theirs}.layernorm_after", f"{ours}/ffn_norm", "layer")
    rows.append(n.Name(f"{attention}.self.rpb", f"{ours}/mixer/bias", "h u v -> u v h"))
    for part in ("query", "key", "value"):
        theirs_part, bias = f"{attention}.self.{part}", block.mixer.qkv_bias
        rows += linear(theirs_part, f"{ours}/mixer/{part}", n.HEADS_IN, bias)
    rows += linear(f"{attention}.output.dense", f"{ours}/mixer/output", n.HEADS_OUT)
    rows += linear(f"{theirs}.intermediate.dense", f"{ours}/ffn/expand")
    rows += linear(f"{theirs}.output.dense", f"{ours}/ffn/contract")
    if block.layer_scale is not None:
        scales = f"{ours}/mixer_scale", f"{ours}/ffn_scale"
        rows.append(n.Name(f"{theirs}.layer_scale_parameters", scales, "part c -> c"))
    return rows


TRANSFORMERS: dict[str, Family] = {
    kind: Family(build, functools.partial(names, base=kind), inputs, dict(model_type=kind), complete=complete)
    for kind in ("dinat", "nat")
}
