"""One network out of a family that was trained together by `configs/vision/stitchable.py`.

    python -m experiments.compress --workdir=runs/family --out=runs/between \\
        --recipe=configs/compress/member.py:middle

`small`, `large`
    The two networks that the others lie between.
`early`, `middle`, `late`
    One, two or three layers of the small network, then those of the large one that follow, of four. Seconds.
"""

from ml_collections import ConfigDict

PATHS = {"small": (4, None), "early": (1, 1), "middle": (2, 2), "late": (3, 3), "large": (0, 0)}
VARIANTS = tuple(PATHS)


def get_config(variant: str = "middle") -> ConfigDict:
    """Returns the recipe of a variant."""
    at, to = PATHS[variant]
    return ConfigDict(dict(steps=(dict(kind="member", at=at, to=to),)))
