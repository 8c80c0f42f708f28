"""GPT-2, GPT-J, GPT-NeoX (Pythia) and OPT in transformers: layer norms and two-layer perceptrons with biases.

Source of names, defaults and semantics: transformers 5, `models/{gpt2,gptj,gpt_neox,opt}/modeling_*.py`.
"""

from collections.abc import Mapping
from typing import Any

from effjax.errors import UsageError
from effjax.ffn.mlp import MLP
from effjax.interop import names as n
from effjax.interop.families import activations, rope
from effjax.interop.families.tokens import token_inputs
from effjax.interop.family import Family
from effjax.mixers.attention import Attention
from effjax.models.lm import LM, DecoderBlock

Config = Mapping[str, Any]


def required(config: Config, *keys: str) -> tuple[Any, ...]:
    """The values of keys that have no default.

    Raises:
      UsageError: where some are missing.
    """
    missing = [key for key in keys if config.get(key) is None]
    if missing:
        raise UsageError(f"the configuration lacks {', '.join(missing)}: give the content of config.json.")
    return tuple(config[key] for key in keys)


def build_gpt2(config: Config) -> LM:
    """Pre-norm blocks and a learned position table: Radford et al. 2019."""
    dim, depth, heads, vocab = required(config, "n_embd", "n_layer", "n_head", "vocab_size")
    if config.get("scale_attn_by_inverse_layer_idx") or config.get("add_cross_attention"):
        raise UsageError("scale_attn_by_inverse_layer_idx and add_cross_attention are not known here.")
    block = DecoderBlock(
        mixer=Attention(
            heads=heads, causal=True, scale=None if config.get("scale_attn_weights", True) else 1.0
        ),
        ffn=MLP(
            hidden=config.get("n_inner") or 4 * dim,
            activation=activations.ours(config.get("activation_function", "gelu_new")),
        ),
        epsilon=config.get("layer_norm_epsilon", 1e-5),
        norm="layer",
    )
    length = config.get("n_positions", 1024)
    tied = config.get("tie_word_embeddings", True)
    return LM(block, vocab, dim, depth, tied=tied, max_length=length, position_table=length)


def build_gptj(config: Config) -> LM:
    """Both branches read one norm; the first `rotary_dim` channels turn in neighbouring pairs."""
    dim, depth, heads, vocab = required(config, "n_embd", "n_layer", "n_head", "vocab_size")
    mixer = Attention(
        heads=heads,
        qkv_bias=False,
        out_bias=False,
        rotary_base=1e4,
        rotary_dims=config.get("rotary_dim", 64),
        rotary_pairs="neighbours",
        causal=True,
    )
    block = DecoderBlock(
        mixer=mixer,
        ffn=MLP(
            hidden=config.get("n_inner") or 4 * dim,
            activation=activations.ours(config.get("activation_function", "gelu_new")),
        ),
        epsilon=config.get("layer_norm_epsilon", 1e-5),
        norm="layer",
        parallel="one_norm",
    )
    tied = config.get("tie_word_embeddings", False)
    return LM(block, vocab, dim, depth, tied=tied, head_bias=True)


def build_neox(config: Config) -> LM:
    """Both branches read the same input, each through its own norm: Black et al. 2022."""
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    dim, depth, heads, hidden, vocab = required(config, *keys)
    older = {"rope_theta": config.get("rotary_emb_base", 1e4)}
    older["partial_rotary_factor"] = config.get("rotary_pct", 0.25)
    found = rope.read({"max_position_embeddings": 2048, **older, **config})
    bias = config.get("attention_bias", True)
    mixer = Attention(
        heads=heads,
        qkv_bias=bias,
        out_bias=bias,
        rotary_base=found.base,
        rotary_scaling=found.scaling,
        rotary_dims=int(dim // heads * found.fraction),
        causal=True,
    )
    block = DecoderBlock(
        mixer=mixer,
        ffn=MLP(hidden=hidden, activation=activations.ours(config.get("hidden_act", "gelu"))),
        epsilon=config.get("layer_norm_eps", 1e-5),
        norm="layer",
        parallel="two_norms" if config.get("use_parallel_residual", True) else "no",
    )
    return LM(block, vocab, dim, depth, tied=config.get("tie_word_embeddings", False))


def build_opt(config: Config) -> LM:
    """Like GPT-2, with a position table whose first two rows are for nothing: Zhang et al. 2022."""
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "ffn_dim", "vocab_size")
    dim, depth, heads, hidden, vocab = required(config, *keys)
    length = config.get("max_position_embeddings", 2048)
    plain = {"do_layer_norm_before": True, "word_embed_proj_dim": dim, "_remove_final_layer_norm": False}
    for key, value in {**plain, "layer_norm_elementwise_affine": True, "enable_bias": True}.items():
        if config.get(key, value) != value:
            raise UsageError(f"{key}={config[key]} is not known here: {value} is.")
    block = DecoderBlock(
        mixer=Attention(heads=heads, causal=True),
        ffn=MLP(hidden=hidden, activation=activations.ours(config.get("activation_function", "relu"))),
        norm="layer",
    )
    return LM(
        block,
        vocab,
        dim,
        depth,
        tied=config.get("tie_word_embeddings", True),
        max_length=length,
        position_table=length + 2,
        position_offset=2,
    )


def _linear(theirs: str, ours: str, layout: str = n.LINEAR, bias: str | None = n.AS_IS) -> list[n.Row]:
    rows: list[n.Row] = [n.Name(f"{theirs}.weight", f"{ours}/kernel", layout)]
    if bias is not None:
        rows.append(n.Name(f"{theirs}.bias", f"{ours}/bias", bias))
    return rows


def _norm(theirs: str, ours: str) -> list[n.Row]:
    return [n.Name(f"{theirs}.weight", f"{ours}/scale"), n.Name(f"{theirs}.bias", f"{ours}/bias")]


def _head(model: LM, head: str) -> list[n.Row]:
    if model.tied:
        return [n.Ignored(rf"{head}\.weight", "the head is the embedding")]
    rows: list[n.Row] = [n.Name(f"{head}.weight", "head")]
    return [*rows, n.Name(f"{head}.bias", "head_bias")] if model.head_bias else rows


_QKV = tuple(f"blocks/mixer/{part}/kernel" for part in ("query", "key", "value"))
_QKV_BIAS = tuple(f"blocks/mixer/{part}/bias" for part in ("query", "key", "value"))


def names_gpt2(model: Any) -> tuple[n.Row, ...]:
    """GPT-2 keeps its matrices as `[in, out]`."""
    h = "transformer.h.{layer}"
    return (
        n.Name("transformer.wte.weight", "embedding"),
        n.Name("transformer.wpe.weight", "positions"),
        *_norm("transformer.ln_f", "norm"),
        *_head(model, "lm_head"),
        *_norm(f"{h}.ln_1", "blocks/mixer_norm"),
        *_norm(f"{h}.ln_2", "blocks/ffn_norm"),
        n.Name(f"{h}.attn.c_attn.weight", _QKV, "i (part h d) -> i h d"),
        n.Name(f"{h}.attn.c_attn.bias", _QKV_BIAS, n.FUSED_IN_BIAS),
        *_linear(f"{h}.attn.c_proj", "blocks/mixer/output", "(h d) o -> h d o"),
        *_linear(f"{h}.mlp.c_fc", "blocks/ffn/expand", n.AS_IS),
        *_linear(f"{h}.mlp.c_proj", "blocks/ffn/contract", n.AS_IS),
        n.Ignored(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)", "the causal mask"),
    )


def names_gptj(model: Any) -> tuple[n.Row, ...]:
    """One norm a block, and a head with a bias."""
    h = "transformer.h.{layer}"
    rows = [
        n.Name(f"{h}.attn.{part[0]}_proj.weight", f"blocks/mixer/{part}/kernel", n.HEADS_IN)
        for part in ("query", "key", "value")
    ]
    return (
        n.Name("transformer.wte.weight", "embedding"),
        *_norm("transformer.ln_f", "norm"),
        *_head(model, "lm_head"),
        *_norm(f"{h}.ln_1", "blocks/mixer_norm"),
        *rows,
        *_linear(f"{h}.attn.out_proj", "blocks/mixer/output", n.HEADS_OUT, None),
        *_linear(f"{h}.mlp.fc_in", "blocks/ffn/expand"),
        *_linear(f"{h}.mlp.fc_out", "blocks/ffn/contract"),
        n.Ignored(r"transformer\.h\.\d+\.attn\.(bias|masked_bias|embed_positions)", "mask and rotary table"),
    )


def names_neox(model: Any) -> tuple[n.Row, ...]:
    """Query, key and value of one head stand next to each other."""
    h = "gpt_neox.layers.{layer}"
    rows: list[n.Row] = [n.Name(f"{h}.attention.query_key_value.weight", _QKV, "(h part d) i -> i h d")]
    bias = model.block.mixer.qkv_bias
    if bias:
        rows.append(n.Name(f"{h}.attention.query_key_value.bias", _QKV_BIAS, "(h part d) -> h d"))
    return (
        n.Name("gpt_neox.embed_in.weight", "embedding"),
        *_norm("gpt_neox.final_layer_norm", "norm"),
        *_head(model, "embed_out"),
        *_norm(f"{h}.input_layernorm", "blocks/mixer_norm"),
        *_norm(f"{h}.post_attention_layernorm", "blocks/ffn_norm"),
        *rows,
        *_linear(f"{h}.attention.dense", "blocks/mixer/output", n.HEADS_OUT, n.AS_IS if bias else None),
        *_linear(f"{h}.mlp.dense_h_to_4h", "blocks/ffn/expand"),
        *_linear(f"{h}.mlp.dense_4h_to_h", "blocks/ffn/contract"),
        n.Ignored(
            r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
            "mask and rotary frequencies",
        ),
    )


def names_opt(model: Any) -> tuple[n.Row, ...]:
    """The decoder of OPT."""
    h = "model.decoder.layers.{layer}"
    parts = [
        _linear(f"{h}.self_attn.{part[0]}_proj", f"blocks/mixer/{part}", n.HEADS_IN, n.HEADS_IN_BIAS)
        for part in ("query", "key", "value")
    ]
    return (
        n.Name("model.decoder.embed_tokens.weight", "embedding"),
        n.Name("model.decoder.embed_positions.weight", "positions"),
        *_norm("model.decoder.final_layer_norm", "norm"),
        *_head(model, "lm_head"),
        *_norm(f"{h}.self_attn_layer_norm", "blocks/mixer_norm"),
        *_norm(f"{h}.final_layer_norm", "blocks/ffn_norm"),
        *(row for rows in parts for row in rows),
        *_linear(f"{h}.self_attn.out_proj", "blocks/mixer/output", n.HEADS_OUT),
        *_linear(f"{h}.fc1", "blocks/ffn/expand"),
        *_linear(f"{h}.fc2", "blocks/ffn/contract"),
    )


def _prefix(prefix: str, head: str) -> tuple[tuple[str, str], ...]:
    """Checkpoints of the model without its head lack the prefix."""
    return ((rf"^(?!{prefix}\.|{head}\.)", f"{prefix}."),)


TRANSFORMERS = {
    "gpt2": Family(build_gpt2, names_gpt2, token_inputs, renames=_prefix("transformer", "lm_head")),
    "gptj": Family(build_gptj, names_gptj, token_inputs, renames=_prefix("transformer", "lm_head")),
    "gpt_neox": Family(
        build_neox,
        names_neox,
        token_inputs,
        renames=((r"^lm_head\.", "embed_out."), *_prefix("gpt_neox", "embed_out")),
    ),
    "opt": Family(build_opt, names_opt, token_inputs, renames=_prefix("model", "lm_head")),
}
