"""Rotary positions as transformers' configurations describe them, in the form of version 4 and of version 5.

Version 4 writes `rope_theta` and `rope_scaling`, version 5 one section `rope_parameters`, and that once for
each kind of layer where kinds differ.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from effjax.errors import UsageError, did_you_mean
from effjax.mixers import rotary

Config = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Rope:
    """What a configuration says of one kind of layer.

    Attributes:
      base: of the frequencies.
      scaling: how they are rescaled.
      fraction: of a head's channels that turn.
    """

    base: float
    scaling: rotary.Scaling | None
    fraction: float


def read(config: Config, layer_type: str | None = None) -> Rope:
    """Reads base, scaling and the share of channels.

    Args:
      config: transformers' configuration; `rope_theta` stands for what neither form gives.
      layer_type: such as `sliding_attention`, where the configuration tells kinds of layers apart.

    Raises:
      UsageError: for a scaling that is not known here.
    """
    section = dict(config.get("rope_parameters") or {})
    if isinstance(section.get(layer_type), Mapping):
        section = dict(section[layer_type])
    elif layer_type == "sliding_attention" and "rope_local_base_freq" in config:
        # Version 4 rescales, and writes rope_theta for, the layers without a window alone.
        base = config["rope_local_base_freq"] or section.get("rope_theta") or config["rope_theta"]
        return Rope(float(base), None, float(config.get("partial_rotary_factor") or 1.0))
    section = {**(config.get("rope_scaling") or {}), **section}
    kind = section.get("rope_type") or section.get("type") or "default"
    if kind not in _READERS:
        raise UsageError(f"rope_type is {kind!r}, which is not known here. {did_you_mean(kind, _READERS)}")
    base = section.get("rope_theta") or config["rope_theta"]
    fraction = section.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    return Rope(float(base), _READERS[kind](config, section), float(fraction))


def _original(config: Config, section: Config) -> int:
    """The length that the model was trained for before it was stretched."""
    return (
        config.get("original_max_position_embeddings")
        or section.get("original_max_position_embeddings")
        or config["max_position_embeddings"]
    )


def _factor(config: Config, section: Config) -> float:
    return float(section.get("factor") or config["max_position_embeddings"] / _original(config, section))


def _llama3(config: Config, section: Config) -> rotary.Scaling:
    low, high = float(section["low_freq_factor"]), float(section["high_freq_factor"])
    return rotary.Llama3(_factor(config, section), low, high, _original(config, section))


def _yarn(config: Config, section: Config) -> rotary.Scaling:
    factor = _factor(config, section)
    amplitude = section.get("attention_factor")
    weight, weight_all = section.get("mscale"), section.get("mscale_all_dim")
    if amplitude is None and weight and weight_all:
        amplitude = rotary.yarn_amplitude(factor, weight) / rotary.yarn_amplitude(factor, weight_all)
    return rotary.Yarn(
        factor,
        _original(config, section),
        fast=float(section.get("beta_fast") or 32.0),
        slow=float(section.get("beta_slow") or 1.0),
        amplitude=None if amplitude is None else float(amplitude),
        whole_pairs=section.get("truncate", True),
    )


def _longrope(config: Config, section: Config) -> rotary.Scaling:
    factor, original = _factor(config, section), _original(config, section)
    amplitude = section.get("attention_factor")
    if amplitude is None:
        amplitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1.0 else 1.0
    short, long = (tuple(map(float, section[f"{length}_factor"])) for length in ("short", "long"))
    return rotary.LongRope(short, long, original, float(amplitude))


_READERS = {
    "default": lambda config, section: None,
    "linear": lambda config, section: rotary.Linear(_factor(config, section)),
    "dynamic": lambda config, section: rotary.Dynamic(
        _factor(config, section), config["max_position_embeddings"]
    ),
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,  # its name in the first Phi-3 checkpoints
}
