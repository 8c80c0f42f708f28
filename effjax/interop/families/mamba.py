"""Mamba and Falcon Mamba in transformers: the language model with a Mamba mixer and no feed-forward layer.

Source of names, defaults and semantics: transformers 5, `models/{mamba,falcon_mamba}/modeling_*.py`.
"""

import functools
from collections.abc import Mapping
from typing import Any

from effjax.errors import UsageError
from effjax.interop import names as n
from effjax.interop.families.gpt import required
from effjax.interop.families.tokens import token_inputs
from effjax.interop.family import Family
from effjax.mixers.mamba import Mamba
from effjax.models.lm import LM, DecoderBlock

# The axes of a fused matrix: inputs of the convolution first, then the gate.
_FUSED = "(part o) i -> i o"


def build(config: Mapping[str, Any], selection_norm: bool = False) -> LM:
    """Makes the model from a config.json; `selection_norm` is what Falcon Mamba adds."""
    dim, depth, vocab = required(config, "hidden_size", "num_hidden_layers", "vocab_size")
    if config.get("hidden_act", "silu") != "silu":
        raise UsageError(f"hidden_act={config['hidden_act']!r} is not known here: Mamba's is 'silu'.")
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


def names(model: Any) -> tuple[n.Row, ...]:
    """The name map."""
    mixer, theirs, ours = model.block.mixer, "backbone.layers.{layer}.mixer", "blocks/mixer"
    rows: list[n.Row] = [
        n.Name("backbone.embeddings.weight", "embedding"),
        n.Name("backbone.norm_f.weight", "norm/scale"),
        n.Name("backbone.layers.{layer}.norm.weight", "blocks/mixer_norm/scale"),
        n.Name(f"{theirs}.in_proj.weight", (f"{ours}/input/kernel", f"{ours}/gate/kernel"), _FUSED),
        n.Name(f"{theirs}.conv1d.weight", f"{ours}/conv_kernel", "i one w -> w (i one)", sizes={"one": 1}),
        n.Name(f"{theirs}.x_proj.weight", f"{ours}/select/kernel", n.LINEAR),
        n.Name(f"{theirs}.dt_proj.weight", f"{ours}/step_size/kernel", n.LINEAR),
        n.Name(f"{theirs}.dt_proj.bias", f"{ours}/step_size/bias"),
        n.Name(f"{theirs}.A_log", f"{ours}/A_log"),
        n.Name(f"{theirs}.D", f"{ours}/D"),
        n.Name(f"{theirs}.out_proj.weight", f"{ours}/output/kernel", n.LINEAR),
    ]
    if mixer.use_bias:
        biases = (f"{ours}/input/bias", f"{ours}/gate/bias")
        rows.append(n.Name(f"{theirs}.in_proj.bias", biases, "(part o) -> o"))
        rows.append(n.Name(f"{theirs}.out_proj.bias", f"{ours}/output/bias"))
    if mixer.conv_bias:
        rows.append(n.Name(f"{theirs}.conv1d.bias", f"{ours}/conv_bias"))
    if model.tied:
        rows.append(n.Ignored(r"lm_head\.weight", "the head is the embedding"))
    else:
        rows.append(n.Name("lm_head.weight", "head"))
    return tuple(rows)


# The authors' own checkpoints call the embedding `embedding`.
_RENAMES = ((r"^(?!backbone\.|lm_head\.)", "backbone."), (r"^backbone\.embedding\.", "backbone.embeddings."))

TRANSFORMERS = {
    "mamba": Family(build, names, token_inputs, renames=_RENAMES),
    "falcon_mamba": Family(
        functools.partial(build, selection_norm=True), names, token_inputs, renames=_RENAMES
    ),
}
