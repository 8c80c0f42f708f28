"""Vision transformers: ViT (Dosovitskiy et al. 2021) with the sizes and recipe of DeiT (Touvron et al. 2021).

    python -m experiments.train --config=configs/vision/vit.py:VARIANT --workdir=runs/vit

`smoke`
    20 steps of a toy on digits: seconds.
`digits`
    0.20M parameters, 80 epochs of 1,437 digits of 8 x 8 pixels: a minute and a half on 2 CPU cores, and an
    accuracy of 99.2% on the 360 held-out digits.
`ti16`, `s16`, `b16`, `l16`
    ImageNet at 224 pixels for 300 epochs, from `imagenet2012` as tfds prepares it. Not run here; the paper
    reports 72.2% (Ti), 79.8% (S) and 81.8% (B) top-1 for this recipe.
"""

from ml_collections import ConfigDict

from configs.vision.recipes import digits, imagenet

VARIANTS = ("smoke", "digits", "ti16", "s16", "b16", "l16")

# Width, depth and heads of the published sizes; the FFN is four times the width.
SIZES = {
    "ti16": dict(dim=192, depth=12, heads=3),
    "s16": dict(dim=384, depth=12, heads=6),
    "b16": dict(dim=768, depth=12, heads=12),
    "l16": dict(dim=1024, depth=24, heads=16),
}


def get_config(variant: str = "digits") -> ConfigDict:
    """Returns the config of a variant."""
    if variant in SIZES:
        return imagenet(vit(**SIZES[variant], patch=16, classes=1000, drop_path=0.1))
    smoke = variant == "smoke"
    size = dict(dim=16, depth=2, heads=2) if smoke else dict(dim=64, depth=4, heads=4)
    return digits(vit(**size, patch=2, classes=10, pool="mean", unroll=size["depth"]), smoke=smoke)


def vit(dim: int, depth: int, heads: int, patch: int, classes: int, **more: object) -> dict:
    """The model section of a ViT."""
    block = dict(mixer=dict(kind="attention", heads=heads), ffn=dict(kind="mlp"))
    return dict(kind="vit", patch=patch, dim=dim, depth=depth, classes=classes, block=block, **more)
