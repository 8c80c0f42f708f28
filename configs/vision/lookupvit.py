"""Few compressed tokens that look things up in many: LookupViT, Koner et al. 2024.

    python -m experiments.train --config=configs/vision/lookupvit.py:VARIANT --workdir=runs/lookupvit

`smoke`
    20 steps of a toy on digits: seconds.
`digits`
    0.24M parameters: 64 lookup tokens of one pixel, and a grid of 4 x 4 that is worked on; every step draws a
    grid of 2, 3 or 4, and the same weights work at any. 97.5% of the 360 held-out digits after 40 epochs: two
    minutes on 2 CPU cores.
`b16-3`, `b16-5`, `b16-7`, `b16-10`
    ViT-B/16 on ImageNet at 224 pixels with a grid of so many compressed tokens a side, with DeiT's recipe.
    Not run here.
`b16-multi`
    The same with a grid of 3, 5, 7 or 10 drawn at every step, to be evaluated at any.
"""

from ml_collections import ConfigDict

from configs.vision.recipes import digits, imagenet

VARIANTS = ("smoke", "digits", "b16-3", "b16-5", "b16-7", "b16-10", "b16-multi")


def get_config(variant: str = "digits") -> ConfigDict:
    """Returns the config of a variant."""
    if variant.startswith("b16"):
        side = variant.removeprefix("b16-")
        sides = dict(side=10, sides=(3, 5, 7, 10)) if side == "multi" else dict(side=int(side))
        return imagenet(lookupvit(768, 12, 12, patch=16, classes=1000, drop_path=0.1, **sides))
    if variant == "smoke":
        return digits(lookupvit(16, 2, 2, patch=2, classes=10, side=2, sides=(1, 2), unroll=2), smoke=True)
    model = lookupvit(64, 3, 4, patch=1, classes=10, side=4, sides=(2, 3, 4), unroll=3)
    return digits(model, smoke=False, steps="40 epochs")


def lookupvit(dim: int, depth: int, heads: int, **more: object) -> dict:
    """The model section: the light perceptron has half the width."""
    block = dict(
        mixer=dict(kind="attention", heads=heads),
        ffn=dict(kind="mlp"),
        light=dict(kind="mlp", ratio=0.5),
        heads=heads,
    )
    return dict(kind="lookup_vit", dim=dim, depth=depth, block=block, **more)
