"""Backbones with attention in windows: toys of timm and transformers, and published sizes."""

import numpy as np
import timm
import transformers

from tests.parity.case import Case, channels_first, images

_TOY = dict(embed_dim=8, depths=(2, 3), num_heads=(2, 4), num_classes=5, drop_path_rate=0.0)
_TOY_1 = dict(_TOY, img_size=32, window_size=4, patch_size=2)
_TOY_2 = dict(_TOY_1, pretrained_window_sizes=(0, 0))

# Keyword arguments of timm, each changing one thing.
_VARIANTS = {
    "toy": {},
    "odd": dict(img_size=26, window_size=5),  # maps of 13 and 7 places in windows of 5
    "oblong": dict(img_size=(12, 32), window_size=4),  # one window high in the second stage
    "oblong_window": dict(window_size=((4, 8), (2, 4))),
    "one_window": dict(window_size=16),
    "cropped": dict(img_size=31),
    "no_bias": dict(qkv_bias=False),
    "max": dict(global_pool="max"),
    "features": dict(num_classes=0),
    "ratio": dict(mlp_ratio=2.7),
}


def _timm(name, changes, toy, **options):
    config = {**toy, **changes}
    size = config["img_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return Case(
        source=f"timm:{name}",
        config=config,
        module=lambda: timm.create_model(name, **config),
        inputs=lambda rng: (rng.standard_normal((2, height, width, 3), dtype=np.float32),),
        call=channels_first,
        **options,
    )


def _published(name, **options):
    side = int(name.split("_")[-1].split("to")[-1])
    return Case(f"timm:{name}", {}, lambda: timm.create_model(name), images(side), channels_first, **options)


_ENCODER = dict(
    embed_dim=8,
    depths=(2, 3),
    num_heads=(2, 4),
    window_size=4,
    image_size=32,
    patch_size=2,
    drop_path_rate=0.0,
)


def _transformers(kind, changes, call=lambda module, x: channels_first(module, x).logits, side=32, **options):
    cls = getattr(transformers, kind)
    config = {**_ENCODER, **changes} if changes is not None else {}
    if "v2" in kind and changes is not None:
        config.setdefault("pretrained_window_sizes", (0, 0))
    return Case(
        f"transformers:{cls.config_class.model_type}",
        config,
        lambda: cls(cls.config_class(**config)),
        images(side),
        call,
        **options,
    )


def _pooled(module, pictures):
    return channels_first(module, pictures).pooler_output


_FINE = dict(gradient=True, fixture=True)

CASES = {
    **{
        f"timm_swin_{name}": _timm(
            "swin_tiny_patch4_window7_224", changes, _TOY_1, **(_FINE if name in ("toy", "odd") else {})
        )
        for name, changes in _VARIANTS.items()
    },
    **{
        f"timm_swinv2_{name}": _timm(
            "swinv2_tiny_window8_256", changes, _TOY_2, **(_FINE if name in ("toy", "odd") else {})
        )
        for name, changes in _VARIANTS.items()
    },
    "timm_swinv2_trained": _timm("swinv2_tiny_window8_256", dict(pretrained_window_sizes=(3, 2)), _TOY_2),
    "timm_swin_s3_tiny_224": _published("swin_s3_tiny_224"),
    "timm_swinv2_base_window12to16_192to256": _published("swinv2_base_window12to16_192to256"),
    "transformers_swin": _transformers("SwinForImageClassification", {}, fixture=True),
    "transformers_swin_odd": _transformers(
        "SwinForImageClassification", dict(image_size=26, window_size=5), side=26
    ),
    "transformers_swin_padded_patches": _transformers("SwinForImageClassification", {}, side=31),
    "transformers_swin_model": _transformers("SwinModel", dict(layer_norm_eps=1e-3, qkv_bias=False), _pooled),
    "transformers_swin_tiny": _transformers("SwinForImageClassification", None, side=224),
    "transformers_swinv2": _transformers("Swinv2ForImageClassification", {}, fixture=True),
    "transformers_swinv2_odd": _transformers(
        "Swinv2ForImageClassification", dict(image_size=26, window_size=5), side=26
    ),
    "transformers_swinv2_clipped": _transformers("Swinv2ForImageClassification", dict(window_size=12)),
    "transformers_swinv2_model": _transformers("Swinv2Model", dict(pretrained_window_sizes=(3, 2)), _pooled),
}
