"""What the names of timm's vision transformers stand for: keyword arguments that differ from the defaults.

Source: the registered functions and default configurations of timm 1.0.31, in its
`models/vision_transformer.py` and `models/deit.py`; `tests/parity` holds this table against them.
"""

from collections.abc import Mapping
from typing import Any

_WIDTHS = {  # channels, blocks, heads, expansion
    "pwee": (256, 16, 4, 5.0),
    "wee": (256, 14, 4, 5.0),
    "little": (320, 14, 5, 5.6),
    "tiny": (192, 12, 3, 4.0),
    "xsmall": (256, 10, 4, 4.0),
    "small": (384, 12, 6, 4.0),
    "medium": (512, 12, 8, 4.0),
    "mediumd": (512, 20, 8, 4.0),
    "betwixt": (640, 12, 10, 4.0),
    "base": (768, 12, 12, 4.0),
    "plus": (896, 12, 14, 4.0),
    "so150m": (896, 18, 14, 2.572),
    "so150m2": (832, 21, 13, 34 / 13),
    "large": (1024, 24, 16, 4.0),
    "intern300m": (1024, 24, 16, 4.0),
    "so400m": (1152, 27, 16, 3.7362),
    "huge": (1280, 32, 16, 4.0),
    "giant": (1408, 40, 16, 48 / 11),
    "giantopt": (1536, 40, 16, 4.0),
    "gigantic": (1664, 48, 16, 64 / 13),
}
_CLIP = dict(pre_norm=True, norm_layer="layernorm", norm_eps=1e-5)
_QUICK = dict(_CLIP, act_layer="quick_gelu")
_GAP = dict(class_token=False, global_pool="avg", fc_norm=False)
_MAP = dict(class_token=False, global_pool="map", num_classes=0)
_TANH = dict(act_layer="gelu_tanh")
_FEATURES = dict(num_classes=0)
_SIGLIP_GAP = dict(_GAP, num_classes=0)
_DINOV2 = dict(init_values=1e-5, img_size=518, num_classes=0)
_TIPS = dict(init_values=1.0, img_size=448, num_classes=0, reg_tokens=1, no_embed_class=True)
_GIANT_2 = dict(embed_dim=1536, num_heads=24)  # the giant of DINOv2
_SWIGLU = dict(_GIANT_2, mlp_ratio=5.33334, mlp_layer="swiglupacked", act_layer="silu")
_REG = dict(class_token=False, no_embed_class=True, global_pool="avg", init_values=1e-5)
_DEIT3 = dict(no_embed_class=True, init_values=1e-6)
_RADIO = dict(img_size=512, reg_tokens=7, no_embed_class=True, final_norm=False, num_classes=0)
_XP = dict(
    pre_norm=True,
    no_embed_class=True,
    norm_layer="rmsnorm",
    block_fn="parallelscalingblock",
    qkv_bias=False,
    qk_norm=True,
)

# Keyword arguments that several names share, and the names.
_GROUPS: tuple[tuple[Mapping[str, Any], str], ...] = (
    (
        {},
        "vit_tiny_patch16_224 vit_tiny_patch16_384 vit_small_patch32_224 vit_small_patch32_384 "
        "vit_small_patch16_224 vit_small_patch16_384 vit_base_patch32_224 "
        "vit_base_patch32_384 vit_base_patch16_224 vit_base_patch16_384 vit_base_patch8_224 "
        "vit_large_patch16_224 vit_large_patch16_384 vit_large_patch32_384 vit_large_patch14_224 "
        "vit_giant_patch14_224 vit_gigantic_patch14_224 deit_tiny_patch16_224 deit_small_patch16_224 "
        "deit_base_patch16_224 deit_base_patch16_384",
    ),
    (_FEATURES, "vit_large_patch32_224 vit_huge_patch14_224 vit_small_patch8_224"),
    (dict(num_classes=11221, qkv_bias=False), "vit_base_patch16_224_miil"),
    (
        dict(distilled=True),
        "deit_tiny_distilled_patch16_224 deit_small_distilled_patch16_224 deit_base_distilled_patch16_224 "
        "deit_base_distilled_patch16_384",
    ),
    (
        _DEIT3,
        "deit3_small_patch16_224 deit3_small_patch16_384 deit3_medium_patch16_224 deit3_base_patch16_224 "
        "deit3_base_patch16_384 deit3_large_patch16_224 deit3_large_patch16_384 deit3_huge_patch14_224",
    ),
    (dict(img_size=240, no_embed_class=True), "flexivit_small flexivit_base flexivit_large"),
    (dict(global_pool="avg"), "eva_large_patch14_196 eva_large_patch14_336"),
    (dict(init_values=1e-5), "vit_base_patch16_plus_240 vit_base_patch32_plus_256"),
    (dict(init_values=1e-5, depth=36), "vit_small_patch16_36x1_224"),
    (
        _CLIP,
        "vit_base_patch32_clip_224 vit_base_patch32_clip_384 vit_base_patch32_clip_448 "
        "vit_base_patch16_clip_224 vit_base_patch16_clip_384 vit_large_patch14_clip_224 "
        "vit_large_patch14_clip_336 vit_huge_patch14_clip_224 vit_huge_patch14_clip_336",
    ),
    (
        dict(_CLIP, num_classes=512),
        "vit_xsmall_patch16_clip_224 vit_medium_patch32_clip_224 vit_medium_patch16_clip_224 "
        "vit_betwixt_patch32_clip_224 vit_base_patch32_clip_256",
    ),
    (dict(_CLIP, num_classes=640), "vit_base_patch16_plus_clip_240"),
    (dict(_CLIP, num_classes=1024), "vit_huge_patch14_clip_378 vit_giant_patch14_clip_224"),
    (dict(_CLIP, num_classes=1280), "vit_gigantic_patch14_clip_224 vit_gigantic_patch14_clip_378"),
    (
        dict(_QUICK, num_classes=512),
        "vit_base_patch32_clip_quickgelu_224 vit_base_patch16_clip_quickgelu_224",
    ),
    (
        dict(_QUICK, num_classes=768),
        "vit_large_patch14_clip_quickgelu_224 vit_large_patch14_clip_quickgelu_336",
    ),
    (
        dict(_QUICK, num_classes=1024),
        "vit_huge_patch14_clip_quickgelu_224 vit_huge_patch14_clip_quickgelu_378",
    ),
    (dict(_QUICK, num_classes=1280), "vit_gigantic_patch14_clip_quickgelu_224"),
    (dict(_GAP, num_heads=16), "vit_base_patch16_gap_224"),
    (
        _SIGLIP_GAP,
        "vit_huge_patch14_gap_224 vit_huge_patch16_gap_448 vit_giant_patch16_gap_224 "
        "vit_base_patch16_siglip_gap_224 vit_base_patch16_siglip_gap_256 vit_base_patch16_siglip_gap_384 "
        "vit_base_patch16_siglip_gap_512 vit_large_patch16_siglip_gap_256 vit_large_patch16_siglip_gap_384 "
        "vit_so400m_patch14_siglip_gap_224 vit_so400m_patch14_siglip_gap_378 "
        "vit_so400m_patch14_siglip_gap_384 vit_so400m_patch14_siglip_gap_448 "
        "vit_so400m_patch14_siglip_gap_896",
    ),
    (
        dict(_SIGLIP_GAP, **_TANH),
        "vit_base_patch32_siglip_gap_256 vit_large_patch16_siglip_gap_512 vit_so400m_patch16_siglip_gap_256 "
        "vit_so400m_patch16_siglip_gap_384 vit_so400m_patch16_siglip_gap_512 "
        "vit_giantopt_patch16_siglip_gap_256 vit_giantopt_patch16_siglip_gap_384",
    ),
    (
        _MAP,
        "vit_base_patch16_siglip_224 vit_base_patch16_siglip_256 vit_base_patch16_siglip_384 "
        "vit_base_patch16_siglip_512 vit_large_patch16_siglip_256 vit_large_patch16_siglip_384 "
        "vit_so400m_patch14_siglip_224 vit_so400m_patch14_siglip_378 vit_so400m_patch14_siglip_384",
    ),
    (
        dict(_MAP, **_TANH),
        "vit_base_patch32_siglip_256 vit_large_patch16_siglip_512 vit_so400m_patch16_siglip_256 "
        "vit_so400m_patch16_siglip_384 vit_so400m_patch16_siglip_512 vit_giantopt_patch16_siglip_256 "
        "vit_giantopt_patch16_siglip_384",
    ),
    (dict(_GAP, qkv_bias=False, init_values=1e-6, num_classes=11821), "vit_medium_patch16_gap_240"),
    (
        dict(_GAP, qkv_bias=False, init_values=1e-6),
        "vit_medium_patch16_gap_256 vit_medium_patch16_gap_384 vit_betwixt_patch16_gap_256",
    ),
    (
        dict(_REG, reg_tokens=1),
        "vit_wee_patch16_reg1_gap_256 vit_little_patch16_reg1_gap_256 vit_medium_patch16_reg1_gap_256 "
        "vit_betwixt_patch16_reg1_gap_256",
    ),
    (
        dict(_REG, reg_tokens=1, block_fn="parallelscalingblock"),
        "vit_pwee_patch16_reg1_gap_256",
    ),
    (
        dict(_REG, reg_tokens=4),
        "vit_little_patch16_reg4_gap_256 vit_medium_patch16_reg4_gap_256 vit_mediumd_patch16_reg4_gap_256 "
        "vit_mediumd_patch16_reg4_gap_384 vit_betwixt_patch16_reg4_gap_256 vit_betwixt_patch16_reg4_gap_384",
    ),
    (dict(_REG, reg_tokens=4, init_values=None), "vit_base_patch16_reg4_gap_256"),
    (dict(_GAP, reg_tokens=4), "vit_so150m_patch16_reg4_gap_256 vit_so150m_patch16_reg4_gap_384"),
    (dict(_MAP, reg_tokens=4, num_classes=1000), "vit_so150m_patch16_reg4_map_256"),
    (
        dict(_REG, reg_tokens=1, no_embed_class=False, qkv_bias=False),
        "vit_so150m2_patch16_reg1_gap_256 vit_so150m2_patch16_reg1_gap_384 vit_so150m2_patch16_reg1_gap_448",
    ),
    (_DINOV2, "vit_small_patch14_dinov2 vit_base_patch14_dinov2 vit_large_patch14_dinov2"),
    (dict(_DINOV2, **_SWIGLU), "vit_giant_patch14_dinov2"),
    (
        dict(_DINOV2, reg_tokens=4, no_embed_class=True),
        "vit_small_patch14_reg4_dinov2 vit_base_patch14_reg4_dinov2 vit_large_patch14_reg4_dinov2",
    ),
    (dict(_DINOV2, reg_tokens=4, no_embed_class=True, **_SWIGLU), "vit_giant_patch14_reg4_dinov2"),
    (_TIPS, "vit_base_patch14_reg1_tipsv2 vit_large_patch14_reg1_tipsv2"),
    (dict(_TIPS, mlp_ratio=4304 / 1152), "vit_so400m_patch14_reg1_tipsv2"),
    (dict(_TIPS, **_SWIGLU), "vit_giant_patch14_reg1_tipsv2"),
    (dict(_RADIO, init_values=1e-5), "vit_base_patch16_radio_v3 vit_large_patch16_radio_v3"),
    (_RADIO, "vit_huge_patch16_radio_v3"),
    (dict(_RADIO, mlp_ratio=4.0, **_GIANT_2), "vit_giant_patch16_radio_v3"),
    (dict(_RADIO, reg_tokens=9), "vit_huge_patch16_radio_v4"),
    (dict(_RADIO, reg_tokens=9, mlp_ratio=4304 / 1152), "vit_so400m_patch16_radio_v4"),
    (dict(init_values=0.1, final_norm=False, num_classes=0), "vit_intern300m_patch14_448"),
    (
        dict(_GAP, fc_norm=None, qkv_bias=False, init_values=1e-5, block_fn="respostblock"),
        "vit_base_patch16_rpn_224",
    ),
    (_XP, "vit_base_patch16_xp_224 vit_large_patch14_xp_224 vit_huge_patch14_xp_224"),
)

_AIM = dict(
    _GAP,
    patch_size=14,
    depth=24,
    qkv_bias=False,
    proj_bias=False,
    act_layer="silu",
    norm_layer="rmsnorm",
    norm_eps=1e-5,
    embed_norm_layer="rmsnorm",
    mlp_layer="swiglu",
    num_classes=0,
)
_AIM_WIDTHS = {
    "large": (1024, 8, 2.75),
    "huge": (1536, 12, 2.6667),
    "1b": (2048, 16, 2.75),
    "3b": (3072, 24, 2.6667),
}
_TEST = dict(img_size=160, patch_size=16, embed_dim=64, depth=6, num_heads=2, mlp_ratio=3.0)
_TEST_REG = dict(_TEST, class_token=False, reg_tokens=1, init_values=1e-5)
_TEST_96 = dict(_TEST_REG, embed_dim=96, depth=9, num_heads=3)


def architectures() -> dict[str, dict[str, Any]]:
    """Keyword arguments by name."""
    table = {name: _sizes(name) | dict(changes) for changes, names in _GROUPS for name in names.split()}
    for size, (dim, heads, ratio) in _AIM_WIDTHS.items():
        for picture in (224, 336, 448):
            sizes = dict(img_size=picture, embed_dim=dim, num_heads=heads, mlp_ratio=ratio)
            table[f"aimv2_{size}_patch14_{picture}"] = dict(_AIM, **sizes)
    table["test_vit"] = _TEST
    table["test_vit2"] = dict(_TEST_REG, depth=8, global_pool="avg")
    table["test_vit3"] = dict(_TEST_96, mlp_ratio=2.0, global_pool="map", pool_include_prefix=True)
    table["test_vit4"] = dict(_TEST_96, global_pool="avg", norm_layer="rmsnorm")
    return table


def _sizes(name: str) -> dict[str, Any]:
    """What the parts of a name say: size, patch, and the side of the picture, which stands last."""
    words = name.split("_")
    numbers = [int(word) for word in words if word.isdigit()]
    patches = [int(word.removeprefix("patch")) for word in words if word.startswith("patch")]
    dim, depth, heads, ratio = _WIDTHS["plus" if "plus" in words else words[1]]
    return dict(
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        mlp_ratio=ratio,
        patch_size=patches[0] if patches else 16,
        img_size=numbers[-1] if numbers else 224,
    )
