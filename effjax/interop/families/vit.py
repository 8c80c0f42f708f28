"""timm's VisionTransformer: the plain one, class token or mean pooling.

Source of names, defaults and shapes: timm 1.0, `timm/models/vision_transformer.py`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effjax.config import build as build_section
from effjax.errors import UsageError
from effjax.ffn.mlp import MLP
from effjax.interop import names as n
from effjax.interop.family import Family
from effjax.interop.resize import Patches, Positions
from effjax.mixers.attention import Attention
from effjax.models.block import Block
from effjax.models.vit import ViT


@dataclasses.dataclass(frozen=True)
class TimmViT:
    """The keyword arguments of timm that are understood here, with timm's defaults."""

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
    init_values: float | None = None
    drop_path_rate: float = 0.0


def build(config: Mapping[str, Any]) -> ViT:
    """Makes the model from the keyword arguments of `timm.create_model`."""
    c = build_section(TimmViT, config, "config")
    if c.global_pool != "token":
        raise UsageError(f"config.global_pool is {c.global_pool!r}; 'token' is what is understood here.")
    block = Block(
        mixer=Attention(heads=c.num_heads, qkv_bias=c.qkv_bias),
        ffn=MLP(hidden=int(c.embed_dim * c.mlp_ratio)),
        layer_scale=c.init_values,
    )
    return ViT(
        block=block,
        patch=c.patch_size,
        dim=c.embed_dim,
        depth=c.depth,
        classes=c.num_classes,
        drop_path=c.drop_path_rate,
    )


def inputs(model: ViT, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """One picture of the configured size."""
    c = build_section(TimmViT, config, "config")
    height, width = (c.img_size, c.img_size) if isinstance(c.img_size, int) else c.img_size
    return (jax.ShapeDtypeStruct((1, height, width, c.in_chans), jnp.float32),)


def names(model: ViT) -> tuple[n.Row, ...]:
    """The name map of timm's plain vision transformer."""
    patch = {"p": model.patch, "q": model.patch}
    rows = [
        n.Name("cls_token", "class_token", "1 1 c -> 1 c"),
        n.Name("pos_embed", "positions", "1 n c -> n c", resize=Positions(model.patch, prefix=1)),
        n.Name("patch_embed.proj.weight", "embed/projection/kernel", n.PATCHES, patch, resize=Patches()),
        n.Name("patch_embed.proj.bias", "embed/projection/bias"),
        *block_names(model.block),
        n.Name("norm.weight", "norm/scale"),
        n.Name("norm.bias", "norm/bias"),
        n.Name("head.weight", "head/kernel", n.LINEAR, classifier=True),
        n.Name("head.bias", "head/bias", classifier=True),
    ]
    return tuple(rows)


def block_names(block: Block) -> list[n.Row]:
    """The rows of one pre-norm block, for all layers."""
    theirs, ours = "blocks.{layer}.", "blocks/"
    qkv = tuple(f"{ours}mixer/{part}/" for part in ("query", "key", "value"))
    rows: list[n.Row] = [
        n.Name(theirs + "norm1.weight", ours + "mixer_norm/scale"),
        n.Name(theirs + "norm1.bias", ours + "mixer_norm/bias"),
        n.Name(theirs + "attn.qkv.weight", tuple(path + "kernel" for path in qkv), n.FUSED_IN),
        n.Name(theirs + "attn.proj.weight", ours + "mixer/output/kernel", n.HEADS_OUT),
        n.Name(theirs + "attn.proj.bias", ours + "mixer/output/bias"),
        n.Name(theirs + "norm2.weight", ours + "ffn_norm/scale"),
        n.Name(theirs + "norm2.bias", ours + "ffn_norm/bias"),
        n.Name(theirs + "mlp.fc1.weight", ours + "ffn/expand/kernel", n.LINEAR),
        n.Name(theirs + "mlp.fc1.bias", ours + "ffn/expand/bias"),
        n.Name(theirs + "mlp.fc2.weight", ours + "ffn/contract/kernel", n.LINEAR),
        n.Name(theirs + "mlp.fc2.bias", ours + "ffn/contract/bias"),
    ]
    if block.mixer.qkv_bias:
        rows.append(n.Name(theirs + "attn.qkv.bias", tuple(path + "bias" for path in qkv), n.FUSED_IN_BIAS))
    if block.layer_scale is not None:
        rows.append(n.Name(theirs + "ls1.gamma", ours + "mixer_scale"))
        rows.append(n.Name(theirs + "ls2.gamma", ours + "ffn_scale"))
    return rows


_WIDTHS = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
_SIZES = (
    ("tiny", 16, 224),
    ("tiny", 16, 384),
    ("small", 32, 224),
    ("small", 32, 384),
    ("small", 16, 224),
    ("small", 16, 384),
    ("small", 8, 224),
    ("base", 32, 224),
    ("base", 32, 384),
    ("base", 16, 224),
    ("base", 16, 384),
    ("base", 8, 224),
    ("large", 32, 224),
    ("large", 32, 384),
    ("large", 16, 224),
    ("large", 16, 384),
)

TIMM: dict[str, Family] = {
    f"vit_{size}_patch{patch}_{picture}": Family(
        build,
        names,
        inputs,
        dict(
            patch_size=patch,
            img_size=picture,
            embed_dim=_WIDTHS[size][0],
            depth=_WIDTHS[size][1],
            num_heads=_WIDTHS[size][2],
        ),
    )
    for size, patch, picture in _SIZES
}
