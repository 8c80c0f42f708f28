"""DiT by the names of diffusers and by those of the official checkpoints.

diffusers keeps an embedding of time and class in every block. In published weights all are alike, in a fresh
model they are not, and so they are kept apart here too: `condition="per_block"`.

Sources of names, defaults and shapes: diffusers 0.42, `models/transformers/dit_transformer_2d.py`,
`models/attention.py`, `models/embeddings.py`, `models/normalization.py`; github.com/facebookresearch/DiT,
`models.py`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from effjax.config import build as build_section
from effjax.errors import UsageError, did_you_mean
from effjax.ffn.gated import Gated
from effjax.ffn.mlp import MLP
from effjax.interop import names as n
from effjax.interop.families.vit import fused, halves, linear, norm_rows
from effjax.interop.family import Family
from effjax.mixers.attention import Attention
from effjax.models.blocks.adaln import DiTBlock
from effjax.models.dit import DiT

# The FFNs of diffusers: the activation, and whether it is that of a gate.
_FFNS = {
    "gelu": ("gelu", False),
    "gelu-approximate": ("gelu_tanh", False),
    "geglu": ("gelu", True),
    "geglu-approximate": ("quick_gelu", False),
    "swiglu": ("silu", True),
    "linear-silu": ("silu", False),
}
_TABLE = "positions are sines and cosines of the grid, made where they are needed"


@dataclasses.dataclass(frozen=True)
class DiffusersDiT:
    """The configuration of `DiTTransformer2DModel`, with its defaults."""

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int | None = None
    num_layers: int = 28
    dropout: float = 0.0
    norm_num_groups: int = 32
    attention_bias: bool = True
    sample_size: int = 32
    patch_size: int = 2
    activation_fn: str = "gelu-approximate"
    num_embeds_ada_norm: int = 1000
    upcast_attention: bool = False
    norm_type: str = "ada_norm_zero"
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-5


def _read(config: Mapping[str, Any]) -> DiffusersDiT:
    # Keys with an underscore say where a configuration comes from.
    section = {key: value for key, value in config.items() if not key.startswith("_")}
    return build_section(DiffusersDiT, section, "config")


def build_diffusers(config: Mapping[str, Any]) -> DiT:
    """Makes the model of a configuration of `DiTTransformer2DModel`.

    Raises:
      UsageError: for a key or a value that is not understood.
    """
    c = _read(config)
    if c.activation_fn not in _FFNS:
        raise UsageError(f"activation_fn is {c.activation_fn!r}. {did_you_mean(c.activation_fn, _FFNS)}")
    if c.norm_type != "ada_norm_zero" or c.dropout:
        raise UsageError("config.norm_type must be 'ada_norm_zero' and config.dropout 0.")
    activation, gated = _FFNS[c.activation_fn]
    dim = c.num_attention_heads * c.attention_head_dim
    ffn = Gated(4 * dim, activation, use_bias=True) if gated else MLP(4 * dim, activation=activation)
    block = DiTBlock(
        mixer=Attention(heads=c.num_attention_heads, qkv_bias=c.attention_bias),
        ffn=ffn,
        ffn_epsilon=c.norm_eps,
        ffn_affine=c.norm_elementwise_affine,
    )
    out = c.in_channels if c.out_channels is None else c.out_channels
    if out not in (c.in_channels, 2 * c.in_channels):
        raise UsageError(
            f"config.out_channels is {out}: a network predicts its {c.in_channels} channels, or twice as "
            f"many with their variance."
        )
    return DiT(
        block=block,
        patch=c.patch_size,
        dim=dim,
        depth=c.num_layers,
        classes=c.num_embeds_ada_norm,
        learned_sigma=out == 2 * c.in_channels,
        condition="per_block",
        inclusive_frequencies=True,
        position_span=c.sample_size // c.patch_size,
    )


def inputs_diffusers(model: DiT, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """A noisy picture, a time and a label."""
    c = _read(config)
    return _inputs(c.sample_size, c.in_channels)


def names_diffusers(model: DiT) -> tuple[n.Row, ...]:
    """The name map of `DiTTransformer2DModel`."""
    theirs, ours, mixer = "transformer_blocks.{layer}", "blocks", model.block.mixer
    own = f"{theirs}.norm1.emb"
    rows = _patch_rows(model, "pos_embed.proj")
    rows += _time_rows(f"{own}.timestep_embedder", "conditions", ("linear_1", "linear_2"))
    rows.append(n.Name(f"{own}.class_embedder.embedding_table.weight", "conditions/label_embed/embedding"))
    rows += linear(f"{theirs}.norm1.linear", f"{ours}/modulation/projection", n.HEADS_IN)
    for part, ours_part in (("to_q", "query"), ("to_k", "key"), ("to_v", "value")):
        rows += linear(f"{theirs}.attn1.{part}", f"{ours}/mixer/{ours_part}", n.HEADS_IN, mixer.qkv_bias)
    rows += linear(f"{theirs}.attn1.to_out.0", f"{ours}/mixer/output", n.HEADS_OUT)
    if model.block.ffn_affine:
        rows += norm_rows(f"{theirs}.norm3", f"{ours}/ffn_norm", "layer")
    rows += _diffusers_ffn(f"{theirs}.ff.net", f"{ours}/ffn", model.block.ffn)
    rows += linear("proj_out_1", "modulation/projection", n.HEADS_IN)
    rows += linear("proj_out_2", "output")
    return (*rows, n.Ignored(r"pos_embed\.pos_embed", _TABLE))


def _diffusers_ffn(theirs: str, ours: str, ffn: nn.Module) -> list[n.Row]:
    """The rows of its FFN; where it is gated, one matrix holds the value and then the gate."""
    last = linear(f"{theirs}.2", f"{ours}/contract")
    if isinstance(ffn, MLP):
        return [*linear(f"{theirs}.0.proj", f"{ours}/expand"), *last]
    return [*halves(f"{theirs}.0.proj", (f"{ours}/expand", f"{ours}/gate"), bias=True), *last]


@dataclasses.dataclass(frozen=True)
class OfficialDiT:
    """The arguments of the official class, with its defaults."""

    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    class_dropout_prob: float = 0.1
    num_classes: int = 1000
    learn_sigma: bool = True


def build_official(config: Mapping[str, Any]) -> DiT:
    """Makes the model from the arguments of the official class."""
    c = build_section(OfficialDiT, config, "config")
    ffn = MLP(hidden=int(c.hidden_size * c.mlp_ratio), activation="gelu_tanh")
    return DiT(
        block=DiTBlock(mixer=Attention(heads=c.num_heads), ffn=ffn),
        patch=c.patch_size,
        dim=c.hidden_size,
        depth=c.depth,
        classes=c.num_classes,
        null_class=c.class_dropout_prob > 0,
        learned_sigma=c.learn_sigma,
    )


def inputs_official(model: DiT, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """A noisy picture, a time and a label."""
    c = build_section(OfficialDiT, config, "config")
    return _inputs(c.input_size, c.in_channels)


def names_official(model: DiT) -> tuple[n.Row, ...]:
    """The name map of the official checkpoints."""
    theirs, ours, mixer = "blocks.{layer}", "blocks", model.block.mixer
    rows = _patch_rows(model, "x_embedder.proj")
    rows += _time_rows("t_embedder", "", ("mlp.0", "mlp.2"))
    rows.append(n.Name("y_embedder.embedding_table.weight", "label_embed/embedding"))
    rows += fused(f"{theirs}.attn.qkv", f"{ours}/mixer", ("query", "key", "value"), mixer.qkv_bias)
    rows += linear(f"{theirs}.attn.proj", f"{ours}/mixer/output", n.HEADS_OUT)
    rows += linear(f"{theirs}.mlp.fc1", f"{ours}/ffn/expand")
    rows += linear(f"{theirs}.mlp.fc2", f"{ours}/ffn/contract")
    rows += linear(f"{theirs}.adaLN_modulation.1", f"{ours}/modulation/projection", n.HEADS_IN)
    rows += linear("final_layer.adaLN_modulation.1", "modulation/projection", n.HEADS_IN)
    rows += linear("final_layer.linear", "output")
    return (*rows, n.Ignored("pos_embed", _TABLE))


def _patch_rows(model: DiT, theirs: str) -> list[n.Row]:
    sizes = {"p": model.patch, "q": model.patch}
    return linear(theirs, "embed/projection", n.PATCHES, sizes=sizes)


def _time_rows(theirs: str, ours: str, layers: tuple[str, str]) -> list[n.Row]:
    at = f"{ours}/time_embed" if ours else "time_embed"
    return linear(f"{theirs}.{layers[0]}", f"{at}/expand") + linear(f"{theirs}.{layers[1]}", f"{at}/contract")


def _inputs(size: int, channels: int) -> tuple[Any, ...]:
    picture = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
    return picture, jax.ShapeDtypeStruct((1,), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)


# Peebles and Xie 2023, table 1.
_SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}

DIFFUSERS = {"DiTTransformer2DModel": Family(build_diffusers, names_diffusers, inputs_diffusers)}
OFFICIAL = {"DiT": Family(build_official, names_official, inputs_official)}
OFFICIAL |= {
    f"DiT-{size}/{patch}": Family(
        build_official,
        names_official,
        inputs_official,
        dict(hidden_size=dim, depth=depth, num_heads=heads, patch_size=patch),
    )
    for size, (dim, depth, heads) in _SIZES.items()
    for patch in (2, 4, 8)
}
