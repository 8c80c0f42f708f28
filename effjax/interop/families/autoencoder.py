"""The autoencoder of latent diffusion by the names of diffusers' `AutoencoderKL`.

Source of names, defaults and shapes: diffusers 0.42, `models/autoencoders/autoencoder_kl.py`,
`models/autoencoders/vae.py`, `models/resnet.py`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effjax.config import build as build_section
from effjax.errors import UsageError
from effjax.interop import names as n
from effjax.interop.families.vit import linear, norm_rows
from effjax.interop.family import Family
from effjax.models.autoencoder import Autoencoder

_DOWN, _UP = "DownEncoderBlock2D", "UpDecoderBlock2D"


@dataclasses.dataclass(frozen=True)
class Config:
    """The configuration of `AutoencoderKL`, with its defaults."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = (_DOWN,)
    up_block_types: tuple[str, ...] = (_UP,)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | None = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True


def _read(config: Mapping[str, Any]) -> Config:
    section = {key: value for key, value in config.items() if not key.startswith("_")}
    return build_section(Config, section, "config")


def build(config: Mapping[str, Any]) -> Autoencoder:
    """Makes the model of a configuration of `AutoencoderKL`.

    Raises:
      UsageError: for a key or a value that is not understood.
    """
    c = _read(config)
    wanted: dict[str, Any] = dict(
        act_fn="silu",
        mid_block_add_attention=True,
        latents_mean=None,
        latents_std=None,
        out_channels=c.in_channels,
        use_post_quant_conv=c.use_quant_conv,
        down_block_types=(_DOWN,) * len(c.block_out_channels),
        up_block_types=(_UP,) * len(c.block_out_channels),
    )
    for key, value in wanted.items():
        if getattr(c, key) != value:
            raise UsageError(f"config.{key} is {getattr(c, key)!r}, and only {value!r} can be read.")
    return Autoencoder(
        widths=c.block_out_channels,
        latent=c.latent_channels,
        channels=c.in_channels,
        blocks=c.layers_per_block,
        groups=c.norm_num_groups,
        scale=c.scaling_factor,
        shift=c.shift_factor or 0.0,
        projected=c.use_quant_conv,
    )


def inputs(model: Autoencoder, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """One picture, the smallest."""
    return (jax.ShapeDtypeStruct((1, model.factor, model.factor, model.channels), jnp.float32),)


def names(model: Autoencoder) -> tuple[n.Row, ...]:
    """The name map of `AutoencoderKL`."""
    last, rows = len(model.widths) - 1, []
    for half, stage, resize in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        widths = model.widths if half == "encoder" else tuple(reversed(model.widths))
        rows += [*linear(f"{half}.conv_in", f"{half}/input", n.CONV), *_middle(half)]
        width = widths[0]
        for i, after in enumerate(widths):
            for j in range(model.blocks + (half == "decoder")):
                theirs = f"{half}.{stage}_blocks.{i}.resnets.{j}"
                rows += _residual(theirs, f"{half}/stage_{i}_block_{j}", widened=width != after)
                width = after
            if i < last:
                theirs = f"{half}.{stage}_blocks.{i}.{resize}rs.0.conv"
                rows += linear(theirs, f"{half}/{resize}_{i}", n.CONV)
        rows += norm_rows(f"{half}.conv_norm_out", f"{half}/norm", "layer")
        rows += linear(f"{half}.conv_out", f"{half}/output", n.CONV)
    if model.projected:
        rows += linear("quant_conv", "to_code", n.POINTWISE)
        rows += linear("post_quant_conv", "from_code", n.POINTWISE)
    return tuple(rows)


def _residual(theirs: str, ours: str, widened: bool) -> list[n.Row]:
    rows: list[n.Row] = []
    for i in (1, 2):
        rows += norm_rows(f"{theirs}.norm{i}", f"{ours}/norm_{i}", "layer")
        rows += linear(f"{theirs}.conv{i}", f"{ours}/conv_{i}", n.CONV)
    return [*rows, *(linear(f"{theirs}.conv_shortcut", f"{ours}/shortcut", n.POINTWISE) if widened else ())]


def _middle(half: str) -> list[n.Row]:
    theirs, ours = f"{half}.mid_block", f"{half}/middle"
    attention = f"{theirs}.attentions.0"
    rows = _residual(f"{theirs}.resnets.0", f"{ours}/before", widened=False)
    rows += _residual(f"{theirs}.resnets.1", f"{ours}/behind", widened=False)
    rows += norm_rows(f"{attention}.group_norm", f"{ours}/norm", "layer")
    for part, our_part in (("to_q", "query"), ("to_k", "key"), ("to_v", "value")):
        rows += linear(f"{attention}.{part}", f"{ours}/attention/{our_part}", n.HEADS_IN)
    return [*rows, *linear(f"{attention}.to_out.0", f"{ours}/attention/output", n.HEADS_OUT)]


# Files written before diffusers 0.12 spell the attention otherwise.
_OLDER = (
    (r"\.query\.", ".to_q."),
    (r"\.key\.", ".to_k."),
    (r"\.value\.", ".to_v."),
    (r"\.proj_attn\.", ".to_out.0."),
)

DIFFUSERS = {"AutoencoderKL": Family(build, names, inputs, renames=_OLDER)}
