"""GGeM pooling (Ko et al. 2022, arXiv:2212.04114): a ViT read by a learned power mean a group of channels.

    python -m experiments.train --config=configs/vision/ggem.py:VARIANT --workdir=runs/ggem

`smoke`
    20 steps of a toy on digits: seconds.
`digits`
    80 epochs of 1,437 digits of 8 x 8 pixels: 98.9% of the
    360 held-out digits.
`b16`, `l16`
    ImageNet-1k at 224 pixels by DeiT's recipe, one exponent a head. Not run here; the paper reports 0.1 to
    0.7 points over the class token and the average, by the recipes of what it compares with.
"""

from ml_collections import ConfigDict

from configs.vision.recipes import digits, imagenet
from configs.vision.vit import SIZES, vit

VARIANTS = ("smoke", "digits", "b16", "l16")


def get_config(variant: str = "digits") -> ConfigDict:
    """Returns the config of a variant."""
    if variant in ("smoke", "digits"):
        smoke = variant == "smoke"
        size = dict(dim=16, depth=2, heads=2) if smoke else dict(dim=64, depth=4, heads=4)
        return digits(ggem(**size, patch=2, classes=10, unroll=size["depth"]), smoke=smoke)
    return imagenet(ggem(**SIZES[variant], patch=16, classes=1000, drop_path=0.1))


def ggem(dim: int, depth: int, heads: int, patch: int, classes: int, **more: object) -> dict:
    """The model section of a ViT with GGeM pooling, as many groups as heads."""
    return vit(dim, depth, heads, patch, classes, pool=dict(kind="ggem", groups=heads), **more)
