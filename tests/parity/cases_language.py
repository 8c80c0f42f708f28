"""transformers' language models: a toy of every family with odd choices, and one of full width of each.

Where a whole model does not fit 23 GB of memory three times over, `depth` (and Mixtral's experts) is cut and
everything else is as published.
"""

from typing import Any

import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.parity.case import Case, Tensors

_VOCAB = 37
_TOY = dict(
    vocab_size=_VOCAB,
    hidden_size=24,
    intermediate_size=36,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=None,
)
_GPT = dict(vocab_size=_VOCAB, n_embd=24, n_layer=2, n_head=4, n_positions=64, pad_token_id=None)
_NEOX = {k: v for k, v in _TOY.items() if k != "num_key_value_heads"} | dict(hidden_size=32)
_STATE = dict(vocab_size=_VOCAB, hidden_size=24, num_hidden_layers=2, state_size=5, pad_token_id=None)

_HEADS = dict(num_heads=12, head_dim=4, n_groups=2, chunk_size=8)


def _tokens(count: int, vocab: int) -> Any:
    return lambda rng: (rng.integers(0, vocab, (2, count)).astype(np.int32),)


def _call(module: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return module(tokens.long(), use_cache=False).logits


def one_by_one(tensors: Tensors) -> Tensors:
    """Experts as checkpoints name them, from the stacks that transformers 5 holds in memory."""
    block = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
    published: Tensors = {}
    for name, array in tensors.items():
        prefix, _, last = name.rpartition(".")
        if not prefix.endswith("mlp.experts"):
            published[name] = array
            continue
        for expert, stacked in enumerate(array):
            for part, piece in zip(block[last], np.split(stacked, len(block[last])), strict=True):
                published[f"{prefix}.{expert}.{part}.weight"] = piece
    return published


def of_mixtral(tensors: Tensors) -> Tensors:
    """Mixtral's own names of the same."""
    parts = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    published = {}
    for name, array in one_by_one(tensors).items():
        if ".mlp.experts." in name:
            for ours, theirs in parts.items():
                name = name.replace(f".{ours}.", f".{theirs}.")
        published[name.replace(".mlp.", ".block_sparse_moe.")] = array
    return published


def of_neox(tensors: Tensors) -> Tensors:
    """GPT-NeoX calls its head `embed_out`."""
    return {name.replace("lm_head.", "embed_out."): array for name, array in tensors.items()}


def case(kind: str, base: dict[str, Any], count: int = 20, **fields: Any) -> Case:
    """A case of one `model_type`; what `Case` knows is passed on, the rest is configuration."""
    options = {key: fields.pop(key) for key in ("gradient", "fixture", "published") if key in fields}
    config = CONFIG_MAPPING[kind](**{**base, **fields})
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"  # the default knows no float64
    return Case(
        source=f"transformers:{kind}",
        config=config.to_dict(),
        module=lambda: AutoModelForCausalLM.from_config(config),
        inputs=_tokens(count, config.vocab_size),
        call=_call,
        **options,
    )


def _rope(kind: str, **fields: Any) -> dict[str, Any]:
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=100.0, **fields))


_LLAMA3 = _rope(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
_GEMMA2 = dict(query_pre_attn_scalar=9, attn_logit_softcapping=2.0, final_logit_softcapping=3.0)
_GRANITE = dict(
    embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.5, logits_scaling=4.0
)
_MOE = dict(num_experts=5, num_experts_per_tok=2, published=one_by_one)
_NONE = dict(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
_LONG = dict(short_factor=[1.0, 1.1, 1.2], long_factor=[2.0, 3.0, 4.0])

TOYS = {
    "gpt2": case("gpt2", _GPT, gradient=True, fixture=True, **_NONE),
    "gpt2_untied": case(
        "gpt2",
        _GPT,
        n_inner=40,
        tie_word_embeddings=False,
        scale_attn_weights=False,
        activation_function="relu",
    ),
    "llama": case(
        "llama", _TOY, gradient=True, fixture=True, head_dim=10, attention_bias=True, mlp_bias=True, **_LLAMA3
    ),
    "llama_tied": case("llama", _TOY, tie_word_embeddings=True, gradient=True),
    "llama_linear": case("llama", _TOY, **_rope("linear", factor=4.0)),
    "llama_dynamic": case("llama", _TOY | dict(max_position_embeddings=16), **_rope("dynamic", factor=4.0)),
    "llama_yarn": case("llama", _TOY, **_rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "llama_yarn_mscale": case(
        "llama",
        _TOY,
        **_rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=16,
            mscale=0.7,
            mscale_all_dim=1.2,
            truncate=False,
            beta_fast=4,
            beta_slow=0.5,
        ),
    ),
    "mistral": case("mistral", _TOY, fixture=True, gradient=True, sliding_window=5, head_dim=10),
    "mistral_whole": case("mistral", _TOY, sliding_window=None),
    "ministral": case("ministral", _TOY, sliding_window=5, head_dim=6),
    "qwen2": case("qwen2", _TOY, fixture=True),
    "qwen2_late_window": case(
        "qwen2",
        _TOY,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=1,
        tie_word_embeddings=True,
    ),
    "qwen3": case("qwen3", _TOY, fixture=True, head_dim=10, tie_word_embeddings=True),
    "olmo": case("olmo", _TOY, fixture=True, clip_qkv=0.8),
    "olmo2": case("olmo2", _TOY, fixture=True, attention_bias=True),
    "olmo3": case("olmo3", _TOY, num_hidden_layers=4, sliding_window=4),
    "olmoe": case("olmoe", _TOY, fixture=True, gradient=True, clip_qkv=1.0, **_MOE),
    "olmoe_normalised": case("olmoe", _TOY, norm_topk_prob=True, **_MOE),
    "mixtral": case(
        "mixtral",
        _TOY,
        fixture=True,
        gradient=True,
        sliding_window=6,
        num_local_experts=5,
        num_experts_per_tok=3,
        published=of_mixtral,
    ),
    "mamba": case("mamba", _STATE, fixture=True, gradient=True),
    "mamba_odd": case(
        "mamba",
        _STATE,
        conv_kernel=3,
        use_bias=True,
        use_conv_bias=False,
        time_step_rank=5,
        expand=3,
        tie_word_embeddings=False,
    ),
    "falcon_mamba": case("falcon_mamba", _STATE),
    "mamba2": case("mamba2", _STATE, fixture=True, gradient=True, **_HEADS),
    "mamba2_odd": case(
        "mamba2",
        _STATE,
        num_heads=9,
        head_dim=8,
        expand=3,
        n_groups=3,
        chunk_size=256,
        conv_kernel=3,
        use_bias=True,
        use_conv_bias=False,
        tie_word_embeddings=True,
    ),
    "qwen2_moe": case(
        "qwen2_moe", _TOY, moe_intermediate_size=20, shared_expert_intermediate_size=28, **_MOE
    ),
    "qwen3_moe": case("qwen3_moe", _TOY, moe_intermediate_size=20, head_dim=8, **_MOE),
    "gemma": case("gemma", _TOY, head_dim=12),
    "gemma2": case("gemma2", _TOY, fixture=True, gradient=True, head_dim=12, sliding_window=4, **_GEMMA2),
    "gemma3": case("gemma3_text", _TOY, num_hidden_layers=7, head_dim=12, sliding_window=4),
    "phi": case("phi", _TOY | dict(hidden_size=32)),
    "phi_qk_norm": case("phi", _TOY | dict(hidden_size=32, num_key_value_heads=4), qk_layernorm=True),
    "phi3": case("phi3", _TOY, sliding_window=7),
    "phi3_longrope": case("phi3", _TOY, original_max_position_embeddings=16, **_rope("longrope", **_LONG)),
    "stablelm": case("stablelm", _TOY | dict(hidden_size=32), use_qkv_bias=True),
    "stablelm_parallel": case(
        "stablelm", _TOY | dict(hidden_size=32), qk_layernorm=True, use_parallel_residual=True
    ),
    "cohere": case("cohere", _TOY, use_qk_norm=True),
    "cohere2": case("cohere2", _TOY, num_hidden_layers=5, head_dim=8, sliding_window=4),
    "granite": case("granite", _TOY, **_GRANITE),
    "starcoder2": case("starcoder2", _TOY, sliding_window=5),
    "smollm3": case("smollm3", _TOY, num_hidden_layers=5),
    "nemotron": case("nemotron", _TOY, head_dim=8),
    "arcee": case("arcee", _TOY, head_dim=8),
    "glm": case("glm", _TOY, head_dim=8),
    "glm4": case("glm4", _TOY, head_dim=8),
    "helium": case("helium", _TOY, head_dim=6),
    "exaone4": case("exaone4", _TOY, num_hidden_layers=5, sliding_window=4),
    "gptj": case("gptj", _GPT, rotary_dim=4, **_NONE),
    "gpt_neox": case("gpt_neox", _NEOX, published=of_neox),
    "gpt_neox_sequential": case(
        "gpt_neox",
        _NEOX,
        use_parallel_residual=False,
        attention_bias=False,
        published=of_neox,
    ),
    "opt": case(
        "opt",
        {k: v for k, v in _TOY.items() if k not in ("num_key_value_heads", "intermediate_size")},
        ffn_dim=40,
        word_embed_proj_dim=24,
    ),
}

# Published sizes: the models' own config.json.
_LLAMA_1B = dict(
    vocab_size=128_256,
    hidden_size=2048,
    intermediate_size=8192,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    max_position_embeddings=131_072,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    rope_parameters=dict(
        rope_type="llama3",
        rope_theta=500_000.0,
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
)
FULL = {
    "gpt2_124m": case("gpt2", {}, **_NONE),
    "llama_1b": case("llama", _LLAMA_1B, num_hidden_layers=16),
    "mistral_7b_wide": case("mistral", {}, num_hidden_layers=1),
    "qwen2_05b": case(
        "qwen2",
        dict(vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_attention_heads=14),
        num_key_value_heads=2,
        num_hidden_layers=24,
        tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=1e6),
    ),
    "qwen3_06b": case(
        "qwen3",
        dict(vocab_size=151_936, hidden_size=1024, intermediate_size=3072, num_attention_heads=16),
        num_key_value_heads=8,
        head_dim=128,
        num_hidden_layers=28,
        tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=1e6),
    ),
    "olmo_1b": case(
        "olmo",
        dict(vocab_size=50_304, hidden_size=2048, intermediate_size=8192, num_attention_heads=16),
        num_key_value_heads=16,
        num_hidden_layers=16,
        tie_word_embeddings=True,
    ),
    "olmo2_1b": case(
        "olmo2",
        dict(vocab_size=100_352, hidden_size=2048, intermediate_size=8192, num_attention_heads=16),
        num_key_value_heads=16,
        num_hidden_layers=16,
        rope_parameters=dict(rope_type="default", rope_theta=500_000.0),
    ),
    "olmoe_7b_wide": case("olmoe", {}, num_hidden_layers=1, published=one_by_one),
    "mixtral_wide": case("mixtral", {}, num_hidden_layers=1, num_local_experts=3, published=of_mixtral),
}

# With random weights each of its 24 layers makes a rounding error a fifth larger; see test_language.py.
MAMBA_130M = case("mamba", dict(num_hidden_layers=24))

CASES = {f"transformers_{name}": found for name, found in {**TOYS, **FULL}.items()}
