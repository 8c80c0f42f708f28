"""What tells the relatives of Llama apart, as data: one `Brand` for each `model_type` of transformers.

A field that is a string and names a key of the configuration is read from there; `defaults` are what that
`model_type` means where its configuration does not say.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from effjax.layers.norms import NormKind

# Our norms of a block by their names: before each branch, after it, on both sides, one for both branches.
BEFORE = {"mixer_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
AFTER = {"mixer_norm_after": "post_attention_layernorm", "ffn_norm_after": "post_feedforward_layernorm"}
BOTH = {
    "mixer_norm": "input_layernorm",
    "mixer_norm_after": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_norm_after": "post_feedforward_layernorm",
}
GLM_BOTH = {
    "mixer_norm": "input_layernorm",
    "mixer_norm_after": "post_self_attn_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_norm_after": "post_mlp_layernorm",
}
GATED = {"gate": "mlp.gate_proj", "expand": "mlp.up_proj", "contract": "mlp.down_proj"}
PLAIN = {"expand": "mlp.up_proj", "contract": "mlp.down_proj"}


@dataclasses.dataclass(frozen=True)
class Brand:
    """One `model_type`.

    Attributes:
      norm: kind of all norms of the width.
      norms: our norms of a block by their names.
      epsilon: key of the norms' epsilon, or the number.
      parallel: whether both branches read the same input.
      last_norm: name of the norm before the head.
      qkv_bias: key of the biases on query, key and value, or whether there are any.
      out_bias: the same of the attention's output.
      ffn_bias: the same of the feed-forward layers.
      out: name of the attention's output.
      ffn: our feed-forward layers by their names.
      activation: key of the activation.
      fused: whether query, key and value stand in one matrix, one after the other.
      fused_gate: whether gate and expansion do.
      qk_norm: what a norm of queries and keys spans; None means there is none.
      qk_norm_key: key that switches it on, if one does.
      qk_norm_kind: its kind.
      qk_names: names of the two.
      clip: key of the bound of queries, keys and values.
      pairs: which channels turn together.
      rope_on: kinds of layers that have rotary positions; None means all.
      slides: which layers have the window: none, all, those that `layer_types` says, or the late ones, from
        `max_window_layers` on.
      every: without `layer_types`, every so manieth layer has no window; 0 means that all have it.
      scale: key of the factor of the attention's logits; `query_pre_attn_scalar` is its inverse square.
      experts: how experts are named: `w1 w3 w2` of Mixtral or `gate_proj up_proj down_proj`; None has none.
      embedding_scale: key of the factor of the embedding, or `sqrt` of the width.
      defaults: of the configuration.
    """

    norm: NormKind = "rms"
    norms: Mapping[str, str] = dataclasses.field(default_factory=lambda: BEFORE)
    epsilon: str | float = "rms_norm_eps"
    parallel: Literal["no", "one_norm", "two_norms"] = "no"
    last_norm: str = "norm"
    qkv_bias: str | bool = "attention_bias"
    out_bias: str | bool = "attention_bias"
    ffn_bias: str | bool = "mlp_bias"
    out: str = "self_attn.o_proj"
    ffn: Mapping[str, str] = dataclasses.field(default_factory=lambda: GATED)
    activation: str = "hidden_act"
    fused: bool = False
    fused_gate: bool = False
    qk_norm: Literal["head", "width", "each_head"] | None = None
    qk_norm_key: str | None = None
    qk_norm_kind: NormKind = "rms"
    qk_names: tuple[str, str] = ("self_attn.q_norm", "self_attn.k_norm")
    clip: str | None = None
    pairs: Literal["halves", "neighbours"] = "halves"
    rope_on: tuple[str, ...] | None = None
    slides: Literal["none", "all", "types", "late"] = "none"
    every: int = 0
    scale: str | None = None
    experts: Literal["mixtral", "named"] | None = None
    embedding_scale: str | None = None
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _gemma(**fields: Any) -> Brand:
    defaults = {"tie_word_embeddings": True, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh"}
    fields["defaults"] = {**defaults, **fields.get("defaults", {})}
    fields = {"activation": "hidden_activation", **fields}
    return Brand(norm="rms_offset", embedding_scale="sqrt", **fields)


_MIXTRAL = {"rope_theta": 1e6, "rms_norm_eps": 1e-5, "num_key_value_heads": 8, "norm_topk_prob": True}
_QWEN = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}

BRANDS: dict[str, Brand] = {
    "llama": Brand(),
    "mistral": Brand(slides="all", defaults={"sliding_window": 4096, "num_key_value_heads": 8}),
    "ministral": Brand(slides="types", defaults={"sliding_window": 4096, "num_key_value_heads": 8}),
    "qwen2": Brand(slides="late", qkv_bias=True, out_bias=False, defaults=_QWEN),
    "qwen3": Brand(slides="late", qk_norm="head", defaults={**_QWEN, "head_dim": 128}),
    "olmo": Brand(norm="layer_plain", epsilon=1e-5, clip="clip_qkv"),
    "olmo2": Brand(norms=AFTER, qk_norm="width", defaults={"rms_norm_eps": 1e-5}),
    "olmo3": Brand(
        norms=AFTER,
        qk_norm="width",
        slides="types",
        every=4,
        defaults={
            "rms_norm_eps": 1e-5,
            "rope_theta": 5e5,
            "sliding_window": 4096,
            "rope_local_base_freq": None,
        },
    ),
    "olmoe": Brand(
        qk_norm="width",
        clip="clip_qkv",
        experts="named",
        defaults={"rms_norm_eps": 1e-5, "norm_topk_prob": False, "num_experts": 64, "num_experts_per_tok": 8},
    ),
    "mixtral": Brand(slides="all", experts="mixtral", defaults=_MIXTRAL),
    "qwen2_moe": Brand(
        slides="late",
        qkv_bias="qkv_bias",
        out_bias=False,
        experts="named",
        defaults={**_QWEN, "qkv_bias": True, "norm_topk_prob": False},
    ),
    "qwen3_moe": Brand(
        slides="all", qk_norm="head", experts="named", defaults={**_QWEN, "norm_topk_prob": False}
    ),
    "gemma": _gemma(activation="hidden_act", defaults={"hidden_act": "gelu_pytorch_tanh"}),
    "gemma2": _gemma(
        norms=BOTH,
        slides="types",
        every=2,
        scale="query_pre_attn_scalar",
        defaults={
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
        },
    ),
    "gemma3_text": _gemma(
        norms=BOTH,
        slides="types",
        every=6,
        scale="query_pre_attn_scalar",
        qk_norm="head",
        qk_norm_kind="rms_offset",
        defaults={
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
    ),
    "phi": Brand(
        norm="layer",
        norms={"mixer_norm": "input_layernorm"},
        parallel="one_norm",
        epsilon="layer_norm_eps",
        last_norm="final_layernorm",
        qkv_bias=True,
        out_bias=True,
        ffn_bias=True,
        out="self_attn.dense",
        ffn={"expand": "mlp.fc1", "contract": "mlp.fc2"},
        qk_norm="head",
        qk_norm_key="qk_layernorm",
        qk_norm_kind="layer",
        qk_names=("self_attn.q_layernorm", "self_attn.k_layernorm"),
        defaults={"partial_rotary_factor": 0.5, "hidden_act": "gelu_new", "head_bias": True},
    ),
    "phi3": Brand(
        slides="all",
        qkv_bias=False,
        out_bias=False,
        fused=True,
        fused_gate=True,
        defaults={"rms_norm_eps": 1e-5},
    ),
    "stablelm": Brand(
        norm="layer",
        epsilon="layer_norm_eps",
        qkv_bias="use_qkv_bias",
        out_bias=False,
        qk_norm="each_head",
        qk_norm_key="qk_layernorm",
        qk_norm_kind="layer_no_bias",
        qk_names=("self_attn.q_layernorm.norms.{head}", "self_attn.k_layernorm.norms.{head}"),
        defaults={"partial_rotary_factor": 0.25},
    ),
    "cohere": Brand(
        norm="layer_no_bias",
        norms={"mixer_norm": "input_layernorm"},
        parallel="one_norm",
        epsilon="layer_norm_eps",
        qk_norm="each_head",
        qk_norm_key="use_qk_norm",
        qk_norm_kind="layer_no_bias",
        pairs="neighbours",
        defaults={"tie_word_embeddings": True, "logit_scale": 0.0625, "rope_theta": 5e5},
    ),
    "cohere2": Brand(
        norm="layer_no_bias",
        norms={"mixer_norm": "input_layernorm"},
        parallel="one_norm",
        epsilon="layer_norm_eps",
        pairs="neighbours",
        slides="types",
        every=4,
        rope_on=("sliding_attention",),
        defaults={"tie_word_embeddings": True, "logit_scale": 0.0625, "sliding_window": 4096},
    ),
    "granite": Brand(scale="attention_multiplier", embedding_scale="embedding_multiplier"),
    "starcoder2": Brand(
        norm="layer",
        epsilon="norm_epsilon",
        qkv_bias="use_bias",
        out_bias="use_bias",
        ffn_bias="use_bias",
        ffn={"expand": "mlp.c_fc", "contract": "mlp.c_proj"},
        slides="all",
        defaults={"use_bias": True, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True},
    ),
    "smollm3": Brand(
        slides="types",
        defaults={
            "tie_word_embeddings": True,
            "rope_theta": 2e6,
            "no_rope_layer_interval": 4,
            "use_sliding_window": False,
        },
    ),
    "nemotron": Brand(
        norm="layer_offset",
        epsilon="norm_eps",
        ffn=PLAIN,
        defaults={"partial_rotary_factor": 0.5, "hidden_act": "relu2"},
    ),
    "arcee": Brand(ffn=PLAIN, defaults={"hidden_act": "relu2", "rms_norm_eps": 1e-5}),
    "glm": Brand(
        out_bias=False,
        fused_gate=True,
        pairs="neighbours",
        defaults={"attention_bias": True, "partial_rotary_factor": 0.5},
    ),
    "glm4": Brand(
        norms=GLM_BOTH,
        out_bias=False,
        fused_gate=True,
        pairs="neighbours",
        defaults={"attention_bias": True, "partial_rotary_factor": 0.5},
    ),
    "helium": Brand(out_bias=False, pairs="neighbours", defaults={"rope_theta": 1e5, "rms_norm_eps": 1e-8}),
    "exaone4": Brand(
        norms=AFTER,
        qk_norm="head",
        qkv_bias=False,
        out_bias=False,
        slides="types",
        every=4,
        rope_on=("sliding_attention",),
        defaults={"rms_norm_eps": 1e-5, "sliding_window": 4096},
    ),
}
