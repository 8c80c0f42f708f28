"""timm's VisionTransformer and its distilled form: ViT, DeiT, CLIP, SigLIP, DINOv2, AIMv2, FlexiViT.

Source of names, defaults and shapes: timm 1.0.31, `timm/models/vision_transformer.py`, `timm/models/deit.py`,
`timm/layers/attention.py`, `mlp.py`, `attention_pool.py`.
"""

import dataclasses
import functools
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
from effjax.interop.families.timm_vits import architectures
from effjax.interop.family import Family
from effjax.interop.resize import Patches, Positions
from effjax.layers.norms import NormKind
from effjax.layers.pool import AttentionPool
from effjax.mixers.attention import Attention
from effjax.models.blocks.metaformer import Block
from effjax.models.vit import Pool, ViT

# timm's names of activations, norms and poolings, as strings or as the lower case of its classes.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_tanh",
    "gelutanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "quickgelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
NORMS: dict[str, NormKind] = {
    "layernorm": "layer",
    "layernormfp32": "layer",
    "rmsnorm": "rms",
    "rmsnormfp32": "rms",
}
POOLS: dict[str, Pool | None] = {
    "token": "token",
    "avg": "mean",
    "max": "max",
    "avgmax": "mean_max",
    "map": None,  # has parameters
    "": "none",
}


@dataclasses.dataclass(frozen=True)
class TimmViT:
    """The keyword arguments of timm that are understood here, with timm's defaults.

    Layers may be named as timm names them, or be its classes or partial objects. `norm_eps` is no argument of
    timm: it says what timm writes as a partial object. `distilled` chooses the class with two heads.
    """

    img_size: int | tuple[int, ...] = 224
    patch_size: int = 16
    in_chans: int = 3
    num_classes: int = 1000
    global_pool: str = "token"
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    qk_norm: bool = False
    proj_bias: bool = True
    init_values: float | None = None
    class_token: bool = True
    pos_embed: str = "learn"
    no_embed_class: bool = False
    reg_tokens: int = 0
    pre_norm: bool = False
    final_norm: bool = True
    fc_norm: bool | None = None
    pool_include_prefix: bool = False
    dynamic_img_size: bool = False
    pos_drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    weight_init: str = ""
    fix_init: bool = False
    embed_norm_layer: Any = None
    norm_layer: Any = None
    norm_eps: float | None = None
    act_layer: Any = None
    block_fn: Any = None
    mlp_layer: Any = None
    distilled: bool = False


def build(config: Mapping[str, Any]) -> ViT:
    """Makes the model from the keyword arguments of `timm.create_model`.

    Raises:
      UsageError: for an argument that is not understood.
    """
    c = build_section(TimmViT, config, "config")
    norm, epsilon = _norm(c)
    if c.embed_norm_layer is not None and _named(c.embed_norm_layer)[0] not in NORMS:
        raise _unknown("embed_norm_layer", c.embed_norm_layer, NORMS)
    pool: Any = _among(POOLS, c.global_pool, "global_pool")
    after_pool = c.global_pool in ("avg", "avgmax", "max") if c.fc_norm is None else c.fc_norm
    ffn = _ffn(c)
    bare = dataclasses.replace(c, mlp_layer="mlp", proj_bias=True)
    if pool is None:
        pool = AttentionPool(c.num_heads, _ffn(bare), epsilon, norm)
    return ViT(
        block=_block(c, ffn, norm, epsilon),
        patch=c.patch_size,
        dim=c.embed_dim,
        depth=c.depth,
        classes=c.num_classes,
        pool=pool,
        drop_path=c.drop_path_rate,
        dropout=c.pos_drop_rate,
        class_token=c.class_token,
        distillation=c.distilled,
        registers=c.reg_tokens,
        positioned="none" if c.pos_embed in ("", "none") else "patches" if c.no_embed_class else "all",
        patch_bias=not c.pre_norm,
        crop=True,
        patch_norm=c.embed_norm_layer is not None,
        pre_norm=c.pre_norm,
        final_norm="none" if not c.final_norm else "after_pool" if after_pool else "before_pool",
        pool_all=c.pool_include_prefix,
    )


def _block(c: TimmViT, ffn: nn.Module, norm: NormKind, epsilon: float) -> Block:
    orders = {"block": "pre_norm", "respostblock": "res_post_norm", "parallelscalingblock": "parallel"}
    order = _among(orders, "block" if c.block_fn is None else c.block_fn, "block_fn")
    if order == "parallel" and not c.proj_bias:
        raise UsageError("config.proj_bias is False: the parallel block is understood with biases alone.")
    mixer = Attention(
        heads=c.num_heads,
        qkv_bias=c.qkv_bias,
        out_bias=c.proj_bias,
        qk_norm=c.qk_norm,
        qk_norm_kind=norm,
        qk_norm_epsilon=epsilon,
    )
    # Two of timm's blocks take a scale of 0 for none, and one has its norms do the work of the scale.
    scale = {"pre_norm": c.init_values or None, "parallel": c.init_values}.get(order)
    return Block(mixer=mixer, ffn=ffn, epsilon=epsilon, layer_scale=scale, norm=norm, order=order)


def _ffn(c: TimmViT) -> nn.Module:
    hidden = int(c.embed_dim * c.mlp_ratio)
    activation = ACTIVATIONS[
        "gelu" if c.act_layer is None else _among_key(ACTIVATIONS, c.act_layer, "act_layer")
    ]
    kind, options = _named("mlp" if c.mlp_layer is None else c.mlp_layer)
    if kind == "mlp":
        return MLP(hidden=hidden, activation=activation, use_bias=c.proj_bias)
    if kind == "swiglu":
        return Gated(hidden=hidden, activation=activation, use_bias=c.proj_bias)
    if kind == "swiglupacked" or (kind == "glumlp" and options.get("gate_last") is False):
        return Gated(hidden=hidden // 2, activation=activation, use_bias=c.proj_bias)
    raise _unknown("mlp_layer", c.mlp_layer, ("mlp", "swiglu", "swiglupacked"))


def _norm(c: TimmViT) -> tuple[NormKind, float]:
    """Which norm, and its epsilon."""
    kind, options = _named("layernorm" if c.norm_layer is None else c.norm_layer)
    if kind not in NORMS:
        raise _unknown("norm_layer", c.norm_layer, NORMS)
    return NORMS[kind], c.norm_eps or options.get("eps", 1e-6)


def _named(layer: Any) -> tuple[str, Mapping[str, Any]]:
    """Name and options of a layer that is given as a string, a class or a partial object."""
    if isinstance(layer, str):
        return layer, {}
    if hasattr(layer, "func"):
        return _named(layer.func)[0], layer.keywords
    return getattr(layer, "__name__", repr(layer)).lower(), {}


def _among_key(table: Mapping[str, Any], value: Any, argument: str) -> str:
    key = _named(value)[0]
    if key not in table:
        raise _unknown(argument, value, table)
    return key


def _among(table: Mapping[str, Any], value: Any, argument: str) -> Any:
    return table[_among_key(table, value, argument)]


def _unknown(argument: str, value: Any, names: Any) -> UsageError:
    return UsageError(f"config.{argument} is {value!r}. {did_you_mean(_named(value)[0], names)}")


def inputs(model: ViT, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """One picture of the configured size."""
    c = build_section(TimmViT, config, "config")
    height, width = (c.img_size, c.img_size) if isinstance(c.img_size, int) else c.img_size
    return (jax.ShapeDtypeStruct((1, height, width, c.in_chans), jnp.float32),)


def names(model: ViT, packed: bool = False) -> tuple[n.Row, ...]:
    """The name map of timm's vision transformer; `packed` FFNs hold gate and value in one matrix."""
    norm = model.block.norm
    rows = list(patch_rows(model, "patch_embed.proj", "pos_embed"))
    if model.has_class_token:
        rows.append(n.Name("cls_token", "class_token", TOKEN))
    if model.distillation:
        rows.append(n.Name("dist_token", "distillation_token", TOKEN))
        rows += linear("head_dist", "distillation_head", classifier=True)
    if model.registers:
        rows.append(n.Name("reg_token", "registers", TOKEN))
    if model.patch_norm:
        rows += norm_rows("patch_embed.norm", "patch_norm", norm)
    if model.pre_norm:
        rows += norm_rows("norm_pre", "pre_norm", norm)
    if model.final_norm != "none":
        rows += norm_rows("norm" if model.final_norm == "before_pool" else "fc_norm", "norm", norm)
    if isinstance(model.pool, AttentionPool):
        rows += _pool_rows(model.pool)
    rows += (
        _parallel_rows(model.block) if model.block.order == "parallel" else _block_rows(model.block, packed)
    )
    return (*rows, *linear("head", "head", classifier=True))


TOKEN = "1 n c -> n c"


def patch_rows(model: ViT, projection: str, positions: str) -> list[n.Row]:
    """The rows of the patch projection and the position table."""
    sizes = {"p": model.patch, "q": model.patch}
    rows: list[n.Row] = [
        n.Name(f"{projection}.weight", "embed/projection/kernel", n.PATCHES, sizes, resize=Patches())
    ]
    if model.patch_bias:
        rows.append(n.Name(f"{projection}.bias", "embed/projection/bias"))
    if model.positioned != "none":
        resize = Positions(model.patch, prefix=model.positioned_prefix)
        rows.append(n.Name(positions, "positions", TOKEN, resize=resize))
    return rows


def linear(theirs: str, ours: str, layout: str = n.LINEAR, bias: bool = True, **options: Any) -> list[n.Row]:
    """The rows of a projection; `layout` is the kernel's, and a bias has the shape of ours."""
    flat = n.HEADS_IN_BIAS if layout == n.HEADS_IN else n.AS_IS
    rows: list[n.Row] = [n.Name(f"{theirs}.weight", f"{ours}/kernel", layout, **options)]
    return [*rows, n.Name(f"{theirs}.bias", f"{ours}/bias", flat, **options)] if bias else rows


def fused(theirs: str, ours: str, parts: tuple[str, ...], bias: bool) -> list[n.Row]:
    """The rows of one matrix onto the heads of several of our projections."""
    kernels, biases = (tuple(f"{ours}/{part}/{leaf}" for part in parts) for leaf in ("kernel", "bias"))
    rows: list[n.Row] = [n.Name(f"{theirs}.weight", kernels, n.FUSED_IN)]
    return [*rows, n.Name(f"{theirs}.bias", biases, n.FUSED_IN_BIAS)] if bias else rows


def norm_rows(theirs: str, ours: str, kind: NormKind | None) -> list[n.Row]:
    """The rows of a norm; an RMS norm has no bias."""
    rows: list[n.Row] = [n.Name(f"{theirs}.weight", f"{ours}/scale")]
    return [*rows, n.Name(f"{theirs}.bias", f"{ours}/bias")] if kind == "layer" else rows


def _block_rows(block: Block, packed: bool) -> list[n.Row]:
    """The rows of a block with attention first and FFN second."""
    theirs, ours, mixer = "blocks.{layer}", "blocks", block.mixer
    ffn: Any = block.ffn
    rows = norm_rows(f"{theirs}.norm1", f"{ours}/mixer_norm", block.norm)
    rows += norm_rows(f"{theirs}.norm2", f"{ours}/ffn_norm", block.norm)
    rows += fused(f"{theirs}.attn.qkv", f"{ours}/mixer", ("query", "key", "value"), mixer.qkv_bias)
    rows += linear(f"{theirs}.attn.proj", f"{ours}/mixer/output", n.HEADS_OUT, mixer.out_bias)
    rows += _qk_norm_rows(f"{theirs}.attn", mixer)
    rows += ffn_rows(f"{theirs}.mlp", f"{ours}/ffn", ffn, packed)
    if block.layer_scale is not None:
        rows.append(n.Name(f"{theirs}.ls1.gamma", f"{ours}/mixer_scale"))
        rows.append(n.Name(f"{theirs}.ls2.gamma", f"{ours}/ffn_scale"))
    return rows


def _parallel_rows(block: Block) -> list[n.Row]:
    """The rows of `ParallelScalingBlock`: one matrix into the FFN, queries, keys and values.

    Without biases of the latter, the FFN's stands alone.
    """
    theirs, ours, mixer = "blocks.{layer}", "blocks", block.mixer
    ffn: Any = block.ffn
    heads = tuple(f"{ours}/mixer/{part}" for part in ("query", "key", "value"))
    kernels, biases = (tuple(f"{path}/{leaf}" for path in heads) for leaf in ("kernel", "bias"))
    expand = f"{ours}/ffn/expand"
    rows = norm_rows(f"{theirs}.in_norm", f"{ours}/norm", block.norm)
    layout = (n.LINEAR, *[n.HEADS_IN] * 3)
    rows.append(n.Name(f"{theirs}.in_proj.weight", (f"{expand}/kernel", *kernels), layout))
    if mixer.qkv_bias:
        layout = (n.AS_IS, *[n.HEADS_IN_BIAS] * 3)
        rows.append(n.Name(f"{theirs}.in_proj.bias", (f"{expand}/bias", *biases), layout))
    else:
        rows.append(n.Name(f"{theirs}.mlp_bias", f"{expand}/bias"))
    rows += linear(f"{theirs}.attn_out_proj", f"{ours}/mixer/output", n.HEADS_OUT, mixer.out_bias)
    rows += linear(f"{theirs}.mlp_out_proj", f"{ours}/ffn/contract", bias=ffn.use_bias)
    rows += _qk_norm_rows(theirs, mixer)
    if block.layer_scale is not None:
        rows.append(n.Name(f"{theirs}.ls.gamma", f"{ours}/scale"))
    return rows


def _qk_norm_rows(theirs: str, mixer: nn.Module) -> list[n.Row]:
    if not mixer.qk_norm:
        return []
    rows = norm_rows(f"{theirs}.q_norm", "blocks/mixer/query_norm", mixer.qk_norm_kind)
    return rows + norm_rows(f"{theirs}.k_norm", "blocks/mixer/key_norm", mixer.qk_norm_kind)


def ffn_rows(theirs: str, ours: str, ffn: nn.Module | Any, packed: bool = False) -> list[n.Row]:
    """The rows of `Mlp`, `SwiGLU` (two matrices) or `GluMlp` (one that holds both, the gate first)."""
    rows = linear(f"{theirs}.fc2", f"{ours}/contract", bias=ffn.use_bias)
    if isinstance(ffn, MLP):
        return rows + linear(f"{theirs}.fc1", f"{ours}/expand", bias=ffn.use_bias)
    if packed:
        return rows + halves(f"{theirs}.fc1", (f"{ours}/gate", f"{ours}/expand"), ffn.use_bias)
    rows += linear(f"{theirs}.fc1_g", f"{ours}/gate", bias=ffn.use_bias)
    return rows + linear(f"{theirs}.fc1_x", f"{ours}/expand", bias=ffn.use_bias)


def halves(theirs: str, ours: tuple[str, ...], bias: bool) -> list[n.Row]:
    """The rows of one matrix that is several of our projections, one after the other."""
    rows: list[n.Row] = [n.Name(f"{theirs}.weight", tuple(f"{path}/kernel" for path in ours), n.LINEAR)]
    return [*rows, n.Name(f"{theirs}.bias", tuple(f"{path}/bias" for path in ours))] if bias else rows


def _pool_rows(pool: AttentionPool) -> list[n.Row]:
    """The rows of `AttentionPoolLatent`."""
    theirs, ours = "attn_pool", "attention_pool"
    rows: list[n.Row] = [n.Name(f"{theirs}.latent", f"{ours}/query_token", TOKEN)]
    rows += linear(f"{theirs}.q", f"{ours}/query", n.HEADS_IN)
    rows += fused(f"{theirs}.kv", ours, ("key", "value"), bias=True)
    rows += linear(f"{theirs}.proj", f"{ours}/output", n.HEADS_OUT)
    rows += norm_rows(f"{theirs}.norm", f"{ours}/ffn_norm", pool.norm)
    return rows + ffn_rows(f"{theirs}.mlp", f"{ours}/ffn", pool.ffn)


_packed = functools.partial(names, packed=True)

TIMM: dict[str, Family] = {
    name: Family(build, first, inputs, defaults, spellings=(other,))
    for name, defaults in architectures().items()
    for first, other in [(_packed, names) if "packed" in defaults.get("mlp_layer", "") else (names, _packed)]
}
