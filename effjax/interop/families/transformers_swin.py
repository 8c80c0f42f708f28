"""transformers' Swin Transformers, the first and the second version: classifiers and bare models.

Version 5 spells Swin's modules otherwise than its files, which are what is written; of Swin V2 there is one
spelling. Two habits of transformers are not followed. The code of V1 does not shift along a side that is
longer than a window where the other side is just one window; pictures whose sides are equal do not show
this. And its masks subtract 100 from logits, or 200, where ours hide.

Source of names, defaults and shapes: transformers 5.23, `models/swin/*.py`, `models/swinv2/*.py` and
`conversion_mapping.py`.
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effjax.config import build as build_section
from effjax.errors import UsageError
from effjax.ffn.mlp import MLP
from effjax.interop import names as n
from effjax.interop.families.activations import ours as activation
from effjax.interop.families.stages import stage_rows
from effjax.interop.families.timm_swin import bias_rows
from effjax.interop.families.vit import linear, norm_rows
from effjax.interop.family import Family
from effjax.interop.resize import Patches
from effjax.layers import downsample
from effjax.mixers.position_bias import LogSpacedContinuous, RelativeTable
from effjax.mixers.shifted_window import ShiftedWindow
from effjax.mixers.windows import sides
from effjax.models.blocks.metaformer import Block
from effjax.models.heads import Linear
from effjax.models.pyramid import Pyramid, Stage

EPSILON = 1e-5  # of the norms outside of blocks and before the head, whatever the configuration says


@dataclasses.dataclass(frozen=True)
class SwinConfig:
    """What is read of a configuration, with the defaults of `SwinConfig` and `Swinv2Config`."""

    image_size: int | tuple[int, int] = 224
    patch_size: int = 4
    num_channels: int = 3
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7
    pretrained_window_sizes: tuple[int, ...] = (0, 0, 0, 0)
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    drop_path_rate: float = 0.1
    hidden_act: str = "gelu"
    use_absolute_embeddings: bool = False
    layer_norm_eps: float = 1e-5
    num_labels: int | None = None
    id2label: dict[str, Any] | None = None
    architectures: tuple[str, ...] | None = None
    model_type: str = "swin"


def read(config: Mapping[str, Any]) -> SwinConfig:
    """Reads the keys that matter here; a configuration has many that do not."""
    keys = [field.name for field in dataclasses.fields(SwinConfig)]
    section = {key: config[key] for key in keys if config.get(key) is not None}
    if "id2label" in section:
        section["id2label"] = {str(key): value for key, value in section["id2label"].items()}
    return build_section(SwinConfig, section, "config")


def complete(config: Mapping[str, Any], tensors: Collection[str]) -> Mapping[str, Any]:
    """Says which class the tensors belong to."""
    if config.get("architectures"):
        return config
    classifies = any(name.startswith("classifier.") for name in tensors)
    return {**config, "architectures": ("ForImageClassification" if classifies else "Model",)}


def build(config: Mapping[str, Any]) -> Pyramid:
    """Makes the model of a configuration.

    Raises:
      UsageError: for what has no counterpart here: dropout, absolute positions, other classes.
    """
    c = read(config)
    for key in ("hidden_dropout_prob", "attention_probs_dropout_prob", "use_absolute_embeddings"):
        if getattr(c, key):
            raise UsageError(f"config.{key} is {getattr(c, key)}: there is no such thing in this model here.")
    architecture = c.architectures[0] if c.architectures else "ForImageClassification"
    classifies = architecture.endswith("ForImageClassification")
    if not classifies and not architecture.endswith("Model"):
        raise UsageError(
            f"config.architectures is {architecture!r}: a classifier or a bare model is read here."
        )
    labels = 2 if c.id2label is None else len(c.id2label)
    return Pyramid(
        stages=tuple(_stage(c, i) for i in range(len(c.depths))),
        classes=(labels if c.num_labels is None else c.num_labels) if classifies else 0,
        stem=downsample.Patches(c.patch_size, epsilon=EPSILON, edge="pad"),
        head=Linear(epsilon=c.layer_norm_eps),
        drop_path=c.drop_path_rate,
    )


def _stage(c: SwinConfig, i: int) -> Stage:
    second = c.model_type == "swinv2"
    window = c.window_size
    if second:  # windows are those that fit the configured picture, sides rounded down
        window = min(window, *(side // c.patch_size // 2**i for side in sides(c.image_size)))

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
        )
        ffn = MLP(hidden=int(c.embed_dim * 2**i * c.mlp_ratio), activation=activation(c.hidden_act))
        order = dict(order="res_post_norm", norm_scale=0.0) if second else {}
        return Block(mixer=mixer, ffn=ffn, epsilon=c.layer_norm_eps, **order)  # type: ignore[arg-type]

    return Stage(
        depth=c.depths[i],
        dim=c.embed_dim * 2**i,
        blocks=(block(False), block(True)),
        downsample=downsample.Merge(norm_first=not second, epsilon=EPSILON) if i else None,
    )


def inputs(model: Pyramid, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """One picture of the configured size."""
    c = read(config)
    return (jax.ShapeDtypeStruct((1, *sides(c.image_size), c.num_channels), jnp.float32),)


@dataclasses.dataclass(frozen=True)
class Spelling:
    """How the parts of a block are called.

    Attributes:
      heads: of query, key and value.
      output: of the projection behind them.
      positions: prefix of what is known about positions.
      ffn: of the two layers.
    """

    heads: tuple[str, str, str]
    output: str
    positions: str
    ffn: tuple[str, str]


FILES = Spelling(
    ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.output.dense",
    "attention.self",
    ("intermediate.dense", "output.dense"),
)
MODULES = Spelling(
    ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "attention.o_proj",
    "attention.relative_position_bias",
    ("mlp.fc1", "mlp.fc2"),
)


def names(model: Pyramid, base: str, spelling: Spelling = FILES, bare: bool = False) -> tuple[n.Row, ...]:
    """The name map: `base` is a classifier's attribute that holds the encoder, unless it is the encoder."""
    prefix = "" if bare or not model.classes else f"{base}."
    embeddings, sizes = f"{prefix}embeddings", {"p": model.stem.patch, "q": model.stem.patch}
    projection = f"{embeddings}.patch_embeddings.projection"
    rows: list[n.Row] = [
        n.Ignored(r".*\.(relative_position_index|relative_coords_table)", "it holds no parameters"),
        n.Ignored(r".*embeddings\.mask_token", "only masked pre-training reads it"),
        n.Name(f"{projection}.weight", "stem/embed/projection/kernel", n.PATCHES, sizes, resize=Patches()),
        n.Name(f"{projection}.bias", "stem/embed/projection/bias"),
    ]
    rows += norm_rows(f"{embeddings}.norm", "stem/norm", "layer")
    block_rows = functools.partial(_block_rows, spelling=spelling)
    for i, stage in enumerate(model.stages):
        if stage.downsample is not None:
            theirs = f"{prefix}encoder.layers.{i - 1}.downsample"
            rows += norm_rows(f"{theirs}.norm", f"stages_{i}/downsample/norm", "layer")
            rows += linear(f"{theirs}.reduction", f"stages_{i}/downsample/reduction", bias=False)
        rows += stage_rows(stage, f"stages_{i}", f"{prefix}encoder.layers.{i}.blocks.{{layer}}", block_rows)
    rows += norm_rows(f"{prefix}layernorm", "head/norm", "layer")
    return (*rows, *linear("classifier", "head/classifier", classifier=True))


def _block_rows(block: Block, theirs: str, ours: str, spelling: Spelling) -> list[n.Row]:
    mixer = block.mixer
    rows = norm_rows(f"{theirs}.layernorm_before", f"{ours}/mixer_norm", "layer")
    rows += norm_rows(f"{theirs}.layernorm_after", f"{ours}/ffn_norm", "layer")
    for part, name in zip(("query", "key", "value"), spelling.heads, strict=True):
        bias = mixer.qkv_bias and (mixer.key_bias or part != "key")
        rows += linear(f"{theirs}.{name}", f"{ours}/mixer/{part}", n.HEADS_IN, bias)
    rows += linear(f"{theirs}.{spelling.output}", f"{ours}/mixer/output", n.HEADS_OUT)
    network = "continuous_position_bias_mlp"
    rows += bias_rows(f"{theirs}.{spelling.positions}", f"{ours}/mixer", mixer, network=network)
    for name, part in zip(spelling.ffn, ("expand", "contract"), strict=True):
        rows += linear(f"{theirs}.{name}", f"{ours}/ffn/{part}")
    return rows


def _family(base: str, spellings: tuple[Spelling, ...]) -> Family:
    first, *others = (
        functools.partial(names, base=base, spelling=spelling, bare=bare)
        for spelling in spellings
        for bare in (False, True)
    )
    return Family(build, first, inputs, dict(model_type=base), spellings=tuple(others), complete=complete)


TRANSFORMERS: dict[str, Family] = {
    "swin": _family("swin", (FILES, MODULES)),
    "swinv2": _family("swinv2", (FILES,)),
}
