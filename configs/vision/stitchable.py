"""Stitchable networks (Pan et al. 2023): every path between two trained ViTs, all trained together.

    python -m experiments.train --config=configs/vision/vit.py:digits --workdir=runs/vit
    python -m experiments.train --config=configs/vision/vit.py:digits --workdir=runs/vit-small \\
        --config.model.dim=32 --config.model.block.mixer.heads=2
    python -m experiments.train --config=configs/vision/stitchable.py:digits --workdir=runs/family \\
        --config.task.weights=runs/vit --config.task.small_weights=runs/vit-small
    python -m experiments.compress --workdir=runs/family --out=runs/between \\
        --recipe=configs/compress/member.py:middle

`smoke`
    20 steps of a toy whose networks are drawn: seconds.
`digits`
    The ten paths between two ViTs of four layers, one of half the width, and both of them; four members a
    step, taught by the large network. 96.9 to 98.6% of digits; 10 minutes on a busy machine, of which one or
    two compile.
`ti-s`
    The 34 paths between DeiT-Ti and DeiT-S, and both of them: one member a step for 50 epochs at a batch of
    1024, as published, where DeiT-B and the paths from S to it are of the same family. Not run here.
"""

from ml_collections import ConfigDict

from configs.vision.recipes import digits, imagenet
from configs.vision.vit import SIZES, vit

VARIANTS = ("smoke", "digits", "ti-s")


def get_config(variant: str = "digits") -> ConfigDict:
    """Returns the config of a variant."""
    if variant == "ti-s":
        small, large = (
            vit(**SIZES[size], patch=16, classes=1000, drop_path=rate)
            for size, rate in (("ti16", 0.0), ("s16", 0.1))
        )
        config = imagenet(large, epochs=50, lr=5e-5, ema=None)
        config.task.update(kind="stitching", small=small)
        return config
    smoke = variant == "smoke"
    sizes = ((8, 2), (16, 2)) if smoke else ((32, 2), (64, 4))
    depth = 2 if smoke else 4
    small, large = (
        vit(dim=dim, heads=heads, depth=depth, patch=2, classes=10, pool="mean") for dim, heads in sizes
    )
    config = digits(large, smoke=smoke, steps="80 epochs", lr=1e-3)
    config.task.update(kind="stitching", small=small, draws=4)
    return config
