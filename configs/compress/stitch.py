"""Two trained vision transformers, stitched: the first layers of a small one, the last of a large one.

    python -m experiments.train --config=configs/vision/vit.py:digits --workdir=runs/vit
    python -m experiments.train --config=configs/vision/vit.py:digits --workdir=runs/vit-small \\
        --config.model.dim=32 --config.model.block.mixer.heads=2
    python -m experiments.compress --workdir=runs/vit --out=runs/between \\
        --recipe=configs/compress/stitch.py:middle

`early`, `middle`, `late`
    One, two or three layers of four of the small network, then those of the large one that follow, trained
    for 300 steps by what the large one says: 93.6, 95.6 and 97.2% of digits, in seconds.
`middle-fitted`
    The second by least squares alone: 77.8%.

`--recipe.steps[0].small=FOLDER` names another small network. The paper trains all stitches of its family
together for 50 epochs; here one is trained by itself.
"""

from typing import Any

from ml_collections import ConfigDict

PLACES = {"early": 1, "middle": 2, "late": 3}
VARIANTS = (*PLACES, "middle-fitted")


def get_config(variant: str = "middle") -> ConfigDict:
    """Returns the recipe of a variant."""
    place = PLACES[variant.removesuffix("-fitted")]
    steps: tuple[dict[str, Any], ...] = (dict(kind="stitch", small="runs/vit-small", at=place, to=place),)
    if not variant.endswith("-fitted"):
        steps += (dict(kind="recover", how=dict(steps=300)),)
    return ConfigDict(dict(steps=steps))
