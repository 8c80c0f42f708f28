"""Mamba, Falcon Mamba and Mamba-2 in transformers: a language model whose mixer does all, with no FFN.

Source of names, defaults and semantics: transformers 5, `models/{mamba,falcon_mamba,mamba2}/modeling_*.py`.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

from effjax.errors import UsageError
from effjax.interop import names as n
from effjax.interop.families.gpt import required
from effjax.interop.families.tokens import token_inputs
from effjax.interop.family import Family
from effjax.mixers.mamba import Mamba
from effjax.mixers.mamba2 import Mamba2
from effjax.models.lm import LM, DecoderBlock

# The axes of a fused matrix: inputs of the convolution first, then the gate.
_FUSED = "(part o) i -> i o"
_CONV = "i one w -> w (i one)"


def build(config: Mapping[str, Any], selection_norm: bool = False) -> LM:
    """Makes the model from a config.json; `selection_norm` is what Falcon Mamba adds."""
    dim, depth, vocab = _checked(config)
    rank = config.get("time_step_rank", "auto")
    mixer = Mamba(
        inner=config.get("intermediate_size") or int(config.get("expand", 2) * dim),
        state=config.get("state_size", 16),
        width=config.get("conv_kernel", 4),
        rank=None if rank == "auto" else rank,
        use_bias=config.get("use_bias", False),
        conv_bias=config.get("use_conv_bias", True),
        selection_epsilon=config.get("mixer_rms_eps", 1e-6) if selection_norm else None,
    )
    block = DecoderBlock(mixer=mixer, ffn=None, epsilon=config.get("layer_norm_epsilon", 1e-5))
    return LM(block, vocab, dim, depth, tied=config.get("tie_word_embeddings", True))


def build_second(config: Mapping[str, Any]) -> LM:
    """Makes a Mamba-2 from a config.json."""
    dim, depth, vocab = _checked(config)
    limits = tuple(config.get("time_step_limit", (0.0, math.inf)))
    if limits != (0.0, math.inf):
        raise UsageError(f"time_step_limit={limits} is not known here: step sizes are not limited.")
    heads, size = config.get("num_heads", 128), config.get("head_dim", 64)
    mixer = Mamba2(
        inner=heads * size,
        head=size,
        state=config.get("state_size", 128),
        groups=config.get("n_groups", 8),
        width=config.get("conv_kernel", 4),
        use_bias=config.get("use_bias", False),
        conv_bias=config.get("use_conv_bias", True),
        epsilon=config.get("layer_norm_epsilon", 1e-5),
        chunk=config.get("chunk_size", 256),
    )
    block = DecoderBlock(mixer=mixer, ffn=None, epsilon=mixer.epsilon)
    return LM(block, vocab, dim, depth, tied=config.get("tie_word_embeddings", False))


def _checked(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Width, depth and vocabulary."""
    dim, depth, vocab = required(config, "hidden_size", "num_hidden_layers", "vocab_size")
    if config.get("hidden_act", "silu") != "silu":
        raise UsageError(f"hidden_act={config['hidden_act']!r} is not known here: Mamba's is 'silu'.")
    return dim, depth, vocab


def names(model: Any) -> tuple[n.Row, ...]:
    """The name map."""
    mixer, theirs, ours = model.block.mixer, "backbone.layers.{layer}.mixer", "blocks/mixer"
    rows: list[n.Row] = [
        n.Name("backbone.embeddings.weight", "embedding"),
        n.Name("backbone.norm_f.weight", "norm/scale"),
        n.Name("backbone.layers.{layer}.norm.weight", "blocks/mixer_norm/scale"),
        n.Name(f"{theirs}.A_log", f"{ours}/A_log"),
        n.Name(f"{theirs}.D", f"{ours}/D"),
        n.Name(f"{theirs}.out_proj.weight", f"{ours}/output/kernel", n.LINEAR),
        *(_second if isinstance(mixer, Mamba2) else _first)(mixer, theirs, ours),
    ]
    if mixer.use_bias:
        rows.append(n.Name(f"{theirs}.out_proj.bias", f"{ours}/output/bias"))
    if model.tied:
        rows.append(n.Ignored(r"lm_head\.weight", "the head is the embedding"))
    else:
        rows.append(n.Name("lm_head.weight", "head"))
    return tuple(rows)


def _first(mixer: Mamba, theirs: str, ours: str) -> list[n.Row]:
    """What Mamba alone has."""
    rows: list[n.Row] = [
        n.Name(f"{theirs}.in_proj.weight", (f"{ours}/input/kernel", f"{ours}/gate/kernel"), _FUSED),
        n.Name(f"{theirs}.conv1d.weight", f"{ours}/conv_kernel", _CONV, sizes={"one": 1}),
        n.Name(f"{theirs}.x_proj.weight", f"{ours}/select/kernel", n.LINEAR),
        n.Name(f"{theirs}.dt_proj.weight", f"{ours}/step_size/kernel", n.LINEAR),
        n.Name(f"{theirs}.dt_proj.bias", f"{ours}/step_size/bias"),
    ]
    if mixer.use_bias:
        biases = (f"{ours}/input/bias", f"{ours}/gate/bias")
        rows.append(n.Name(f"{theirs}.in_proj.bias", biases, "(part o) -> o"))
    if mixer.conv_bias:
        rows.append(n.Name(f"{theirs}.conv1d.bias", f"{ours}/conv_bias"))
    return rows


def _second(mixer: Mamba2, theirs: str, ours: str) -> list[n.Row]:
    """What Mamba-2 alone has: one matrix makes all, and one convolution runs over x, B and C."""
    made = [f"{ours}/{name}" for name in ("gate", "input", "select", "step_size")]
    convolved = [f"{ours}/{name}" for name in ("conv", "select_conv")]
    rows: list[n.Row] = [
        n.Name(f"{theirs}.in_proj.weight", tuple(f"{path}/kernel" for path in made), n.LINEAR),
        n.Name(
            f"{theirs}.conv1d.weight",
            tuple(f"{path}_kernel" for path in convolved),
            _CONV,
            sizes={"one": 1},
        ),
        n.Name(f"{theirs}.dt_bias", f"{ours}/step_bias"),
        n.Name(f"{theirs}.norm.weight", f"{ours}/norm/scale"),
    ]
    if mixer.use_bias:
        rows.append(n.Name(f"{theirs}.in_proj.bias", tuple(f"{path}/bias" for path in made)))
    if mixer.conv_bias:
        rows.append(n.Name(f"{theirs}.conv1d.bias", tuple(f"{path}_bias" for path in convolved)))
    return rows


# The authors' own checkpoints call the embedding `embedding`.
_RENAMES = ((r"^(?!backbone\.|lm_head\.)", "backbone."), (r"^backbone\.embedding\.", "backbone.embeddings."))

TRANSFORMERS = {
    "mamba": Family(build, names, token_inputs, renames=_RENAMES),
    "mamba2": Family(build_second, names, token_inputs, renames=_RENAMES),
    "falcon_mamba": Family(
        functools.partial(build, selection_norm=True), names, token_inputs, renames=_RENAMES
    ),
}
