"""Llama and its relatives in transformers: one structure, with the options of `brands.BRANDS`.

Source of names, defaults and semantics: transformers 5, `models/<model_type>/modeling_<model_type>.py`, and
the checkpoints' own names, which `conversion_mapping.py` there lists for mixtures of experts.
"""

import functools
from collections.abc import Mapping
from typing import Any

from effjax.errors import UsageError
from effjax.ffn.gated import Gated
from effjax.ffn.mixture import Mixture
from effjax.ffn.mlp import MLP
from effjax.interop import names as n
from effjax.interop.families import activations, rope
from effjax.interop.families.brands import BRANDS, Brand
from effjax.interop.families.tokens import token_inputs
from effjax.interop.family import Family
from effjax.layers.norms import NormKind
from effjax.mixers.attention import Attention
from effjax.models.lm import LM, DecoderBlock, Layer

Config = Mapping[str, Any]

_REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
_DEFAULTS = {
    "rope_theta": 1e4,
    "rms_norm_eps": 1e-6,
    "layer_norm_eps": 1e-5,
    "norm_eps": 1e-5,
    "norm_epsilon": 1e-5,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
}


def build(brand: Brand, config: Config) -> LM:
    """Makes the model from a config.json."""
    missing = [key for key in _REQUIRED if config.get(key) is None]
    if missing:
        raise UsageError(f"the configuration lacks {', '.join(missing)}: give the content of config.json.")
    # A key with no value (`null`) means the default too.
    config = {
        **_DEFAULTS,
        **brand.defaults,
        **{k: v for k, v in config.items() if v is not None or k in _NULL},
    }
    dim, heads = config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim") or dim // heads
    kinds = [layer(brand, config, i) for i in range(config["num_hidden_layers"])]
    same = len(set(kinds)) == 1
    fraction = rope.read(config, layer_type(brand, config, 0)).fraction
    mixer = Attention(
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=size,
        qkv_bias=_of(config, brand.qkv_bias),
        out_bias=_of(config, brand.out_bias),
        qk_norm=brand.qk_norm is not None and (brand.qk_norm_key is None or _of(config, brand.qk_norm_key)),
        qk_norm_kind=brand.qk_norm_kind,
        qk_norm_over=brand.qk_norm or "head",
        qk_norm_epsilon=_of(config, brand.epsilon),
        clip=_number(config.get(brand.clip)) if brand.clip else None,
        rotary_base=kinds[0].rotary_base if same else None,
        rotary_scaling=kinds[0].rotary_scaling if same else None,
        rotary_dims=None if fraction == 1.0 else int(size * fraction),
        rotary_pairs=brand.pairs,
        scale=_scale(brand, config),
        logit_cap=_number(config.get("attn_logit_softcapping")),
        window=kinds[0].window if same else None,
        causal=True,
    )
    block = DecoderBlock(
        mixer=mixer,
        ffn=feed_forward(brand, config),
        epsilon=_of(config, brand.epsilon),
        norm=brand.norm,
        norm_at=_norm_at(brand),
        parallel="one_norm" if config.get("use_parallel_residual") else brand.parallel,
        residual_scale=float(config.get("residual_multiplier", 1.0)),
    )
    return LM(
        block=block,
        vocab=config["vocab_size"],
        dim=dim,
        depth=len(kinds),
        tied=bool(config.get("tie_word_embeddings", False)),
        layers=() if same else tuple(kinds),
        embedding_scale=_embedding_scale(brand, config),
        head_bias=bool(config.get("head_bias", False)),
        logit_scale=float(config.get("logit_scale", 1.0)) / config.get("logits_scaling", 1.0),
        logit_cap=_number(config.get("final_logit_softcapping")),
    )


# Keys whose `null` says something: no window, no cap, no bound.
_NULL = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "rope_local_base_freq")


def layer_type(brand: Brand, config: Config, i: int) -> str:
    """`sliding_attention` or `full_attention`."""
    given = config.get("layer_types")
    if config.get("sliding_window") is None or not config.get("use_sliding_window", True):
        slides = False
    elif brand.slides == "all":
        slides = True
    elif given is not None:
        return given[i]
    elif brand.slides == "late":
        slides = i >= config["max_window_layers"]
    else:
        every = config.get("sliding_window_pattern") or brand.every
        slides = brand.slides == "types" and (not every or (i + 1) % every != 0)
    return "sliding_attention" if slides else "full_attention"


def layer(brand: Brand, config: Config, i: int) -> Layer:
    """Window and rotary positions of layer `i`."""
    kind = layer_type(brand, config, i)
    if kind not in ("sliding_attention", "full_attention"):
        raise UsageError(
            f"layer {i} is of type {kind!r}: sliding_attention and full_attention are known here."
        )
    window = config["sliding_window"] if kind == "sliding_attention" else None
    turns = brand.rope_on is None or kind in brand.rope_on or config.get("sliding_window") is None
    if "no_rope_layer_interval" in config:
        given = config.get("no_rope_layers")
        turns = bool(given[i]) if given else (i + 1) % config["no_rope_layer_interval"] != 0
    if not turns:
        return Layer(window)
    found = rope.read(config, kind)
    return Layer(window, found.base, found.scaling)


def feed_forward(brand: Brand, config: Config) -> Any:
    """The feed-forward layer, one or several experts."""
    activation = activations.ours(_of(config, brand.activation))
    if brand.experts is None:
        kind = Gated if "gate" in brand.ffn else MLP
        use_bias = bool(_of(config, brand.ffn_bias))
        return kind(hidden=config["intermediate_size"], activation=activation, use_bias=use_bias)
    if config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers"):
        raise UsageError("layers with and without experts in one model are not known here.")
    shared = config.get("shared_expert_intermediate_size") or 0
    return Mixture(
        experts=config.get("num_experts") or config["num_local_experts"],
        chosen=config["num_experts_per_tok"],
        hidden=config.get("moe_intermediate_size") or config["intermediate_size"],
        activation=activation,
        normalised=config["norm_topk_prob"],
        shared=shared,
        shared_gate=shared > 0,
    )


def names(brand: Brand, model: Any, stacked: bool = False) -> tuple[n.Row, ...]:
    """The name map; `stacked` is how transformers 5 holds experts in memory, and its checkpoints do not."""
    rows: list[n.Row] = [
        n.Name("model.embed_tokens.weight", "embedding"),
        *norm_rows(model.block.norm, f"model.{brand.last_norm}", "norm"),
        n.Ignored(r".*rotary_emb\.inv_freq", "rotary frequencies follow from the configuration"),
    ]
    if model.tied:
        rows.append(n.Ignored(r"lm_head\.weight", "the head is the embedding"))
    else:
        rows.append(n.Name("lm_head.weight", "head"))
    if model.head_bias:
        rows.append(n.Name("lm_head.bias", "head_bias"))
    for ours, theirs in brand.norms.items():
        if model.block.parallel != "one_norm" or ours != "ffn_norm":
            rows += norm_rows(model.block.norm, f"model.layers.{{layer}}.{theirs}", f"blocks/{ours}")
    rows += attention_rows(brand, model.block.mixer)
    if isinstance(model.block.ffn, Mixture):
        rows += expert_rows(model.block.ffn, brand.experts or "named", stacked)
    else:
        rows += feed_forward_rows(brand, model.block.ffn)
    return tuple(rows)


def norm_rows(kind: NormKind, theirs: str, ours: str, layout: str = n.AS_IS) -> list[n.Row]:
    """Scale and bias of a norm, as far as its kind has them."""
    rows: list[n.Row] = [] if kind == "layer_plain" else [n.Name(f"{theirs}.weight", f"{ours}/scale", layout)]
    if kind in ("layer", "layer_offset"):
        rows.append(n.Name(f"{theirs}.bias", f"{ours}/bias", layout))
    return rows


def attention_rows(brand: Brand, mixer: Attention) -> list[n.Row]:
    """Projections and norms of the attention."""
    theirs, ours = "model.layers.{layer}.self_attn", "blocks/mixer"
    parts = ("query", "key", "value")
    kernels, biases = (tuple(f"{ours}/{part}/{leaf}" for part in parts) for leaf in ("kernel", "bias"))
    rows: list[n.Row] = []
    if brand.fused:
        rows.append(n.Name(f"{theirs}.qkv_proj.weight", kernels, n.HEADS_IN))
    else:
        for part, kernel, bias in zip("qkv", kernels, biases, strict=True):
            rows.append(n.Name(f"{theirs}.{part}_proj.weight", kernel, n.HEADS_IN))
            if mixer.qkv_bias:
                rows.append(n.Name(f"{theirs}.{part}_proj.bias", bias, n.HEADS_IN_BIAS))
    out = f"model.layers.{{layer}}.{brand.out}"
    rows.append(n.Name(f"{out}.weight", f"{ours}/output/kernel", n.HEADS_OUT))
    if mixer.out_bias:
        rows.append(n.Name(f"{out}.bias", f"{ours}/output/bias"))
    if mixer.qk_norm:
        layout = n.HEADS_IN_BIAS if mixer.qk_norm_over == "width" else n.AS_IS
        for part, name in zip(parts, brand.qk_names, strict=False):
            rows += norm_rows(
                mixer.qk_norm_kind, f"model.layers.{{layer}}.{name}", f"{ours}/{part}_norm", layout
            )
    return rows


def feed_forward_rows(brand: Brand, ffn: Gated | MLP) -> list[n.Row]:
    """A feed-forward layer without experts."""
    rows: list[n.Row] = []
    table = dict(brand.ffn)
    if brand.fused_gate:
        del table["gate"], table["expand"]
        kernels = ("blocks/ffn/gate/kernel", "blocks/ffn/expand/kernel")
        rows.append(n.Name("model.layers.{layer}.mlp.gate_up_proj.weight", kernels, n.LINEAR))
    for ours, theirs in table.items():
        rows.append(n.Name(f"model.layers.{{layer}}.{theirs}.weight", f"blocks/ffn/{ours}/kernel", n.LINEAR))
        if ffn.use_bias:
            rows.append(n.Name(f"model.layers.{{layer}}.{theirs}.bias", f"blocks/ffn/{ours}/bias"))
    return rows


def expert_rows(ffn: Mixture, experts: str, stacked: bool) -> list[n.Row]:
    """A mixture: experts one by one, or all in one tensor."""
    block = "block_sparse_moe" if experts == "mixtral" and not stacked else "mlp"
    theirs, ours = f"model.layers.{{layer}}.{block}", "blocks/ffn"
    rows: list[n.Row] = [n.Name(f"{theirs}.gate.weight", f"{ours}/router/kernel", n.LINEAR)]
    kernels = [f"{ours}/{part}_kernel" for part in ("gate", "expand", "contract")]
    if stacked:
        fused = (kernels[0], kernels[1])
        rows.append(n.Name(f"{theirs}.experts.gate_up_proj", fused, "e o i -> e i o", axis=1))
        rows.append(n.Name(f"{theirs}.experts.down_proj", kernels[2], "e o i -> e i o"))
    else:
        parts = ("w1", "w3", "w2") if experts == "mixtral" else ("gate_proj", "up_proj", "down_proj")
        for part, kernel in zip(parts, kernels, strict=True):
            rows.append(n.Name(f"{theirs}.experts.{{expert}}.{part}.weight", kernel, n.LINEAR))
    if ffn.shared:
        for ours_part, part in (("gate", "gate_proj"), ("expand", "up_proj"), ("contract", "down_proj")):
            kernel = f"{ours}/shared/{ours_part}/kernel"
            rows.append(n.Name(f"{theirs}.shared_expert.{part}.weight", kernel, n.LINEAR))
    if ffn.shared_gate:
        rows.append(n.Name(f"{theirs}.shared_expert_gate.weight", f"{ours}/shared_gate/kernel", n.LINEAR))
    return rows


def describe(model: Any) -> dict[str, Any] | None:
    """The config.json of a Llama; None for a model that is none."""
    mixer = getattr(getattr(model, "block", None), "mixer", None)
    if not isinstance(model, LM) or not isinstance(mixer, Attention) or mixer.rotary_base is None:
        return None
    heads = mixer.heads
    size, groups = mixer.head_dim or model.dim // heads, mixer.kv_heads or heads
    config = dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        hidden_size=model.dim,
        intermediate_size=getattr(model.block.ffn, "hidden", None),
        num_hidden_layers=model.depth,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=size,
        vocab_size=model.vocab,
        tie_word_embeddings=model.tied,
        rms_norm_eps=model.block.epsilon,
        rope_theta=mixer.rotary_base,
        max_position_embeddings=model.max_length or _DEFAULTS["max_position_embeddings"],
        hidden_act="silu",
        attention_bias=mixer.qkv_bias,
        mlp_bias=getattr(model.block.ffn, "use_bias", False),
    )
    if config["intermediate_size"] is None:
        return None
    # What is not said above is compared: a model with anything else is no Llama.
    built = build(BRANDS["llama"], config)
    told: Any = dict(kv_heads=groups, head_dim=size)
    if not mixer.qk_norm:
        told |= dict(qk_norm_epsilon=built.block.mixer.qk_norm_epsilon)  # of norms that are not there
    block = model.block.clone(mixer=mixer.clone(**told))
    kept: Any = dict(max_length=model.max_length, remat=model.remat, unroll=model.unroll, cache=model.cache)
    return config if built.clone(**kept) == model.clone(block=block) else None


def _of(config: Config, key: Any) -> Any:
    """A value of the configuration, or `key` itself where that is the value."""
    return config.get(key, False) if isinstance(key, str) else key


def _number(value: Any) -> float | None:
    """JSON writes a whole number without its point."""
    return None if value is None else float(value)


def _norm_at(brand: Brand) -> Any:
    before, after = "mixer_norm" in brand.norms, "mixer_norm_after" in brand.norms
    return "both" if before and after else "before" if before else "after"


def _scale(brand: Brand, config: Config) -> float | None:
    if brand.scale is None or brand.scale not in config:
        return None
    value = config[brand.scale]
    return float(value**-0.5 if brand.scale == "query_pre_attn_scalar" else value)


def _embedding_scale(brand: Brand, config: Config) -> float:
    if brand.embedding_scale == "sqrt":
        return config["hidden_size"] ** 0.5
    return float(config.get(brand.embedding_scale, 1.0)) if brand.embedding_scale else 1.0


# Checkpoints of the model without its head have no prefix.
_PREFIX = ((r"^(?!model\.|lm_head\.)", "model."),)

TRANSFORMERS = {
    name: Family(
        build=functools.partial(build, brand),
        names=functools.partial(names, brand),
        inputs=token_inputs,
        renames=_PREFIX,
        spellings=(functools.partial(names, brand, stacked=True),) if brand.experts else (),
        describe=describe if name == "llama" else None,
    )
    for name, brand in BRANDS.items()
}
