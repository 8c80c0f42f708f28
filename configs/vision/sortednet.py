"""SortedNet (Valipour et al. 2023): one ViT in which smaller ones lie, all trained at once.

    python -m experiments.train --config=configs/vision/sortednet.py:VARIANT --workdir=runs/sorted
    python -m experiments.compress --workdir=runs/sorted --out=runs/half \\
        --recipe=configs/compress/slice.py:half

`smoke`
    20 steps of a toy: seconds.
`digits`
    The ViT of `configs/vision/vit.py:digits` and all 12 with a quarter to all of its heads and hidden units
    and half to all of its layers; two of them a step. 3 minutes; 98.33%, and 97.5 to 99.2% of slices.
`digits-whole`
    The same ViT and as many steps, of which only the whole is trained: what slices of an ordinary network do.
`b16`
    ViT-B/16 on ImageNet with 48 networks inside, four a step. Not run here.
"""

import itertools

from ml_collections import ConfigDict

from configs.vision import vit

VARIANTS = ("smoke", "digits", "digits-whole", "b16")
WIDTHS = {"smoke": (0.5, 1.0), "digits": (0.25, 0.5, 0.75, 1.0), "b16": (0.25, 0.5, 0.75, 1.0)}
DEPTHS = {"smoke": (1.0,), "digits": (0.5, 0.75, 1.0), "b16": (0.5, 0.75, 1.0)}


def get_config(variant: str = "digits") -> ConfigDict:
    """Returns the config of a variant."""
    name = variant.split("-")[0]
    config = vit.get_config(name)
    widths, depths = WIDTHS[name], DEPTHS[name]
    networks = tuple(
        dict(heads=heads, hidden=hidden, depth=depth)
        for heads, hidden, depth in itertools.product(widths, widths, depths)
        if name == "b16" or heads == hidden
    )
    draws = 4 if name == "b16" else 2
    if variant == "digits-whole":
        networks, draws = (dict(heads=1.0, hidden=1.0, depth=1.0),), 1
    config.train.nested = dict(networks=networks, draws=draws)
    return config
