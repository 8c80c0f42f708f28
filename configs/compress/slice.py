"""A smaller network out of one in which it lies (SortedNet): the first layers, heads and hidden units.

    python -m experiments.compress --workdir=runs/sorted --out=runs/half \\
        --recipe=configs/compress/slice.py:half

`half`, `quarter`
    So much of the heads and hidden units of every layer, all layers.
`shallow`
    All of the first half of the layers.
`small`
    Half of the heads and hidden units of the first half of the layers.
"""

from ml_collections import ConfigDict

SIZES = {
    "half": dict(heads=0.5, hidden=0.5),
    "quarter": dict(heads=0.25, hidden=0.25),
    "shallow": dict(depth=0.5),
    "small": dict(heads=0.5, hidden=0.5, depth=0.5),
}
VARIANTS = tuple(SIZES)


def get_config(variant: str = "half") -> ConfigDict:
    """Returns the recipe of a variant."""
    return ConfigDict(dict(steps=(dict(kind="slice", **SIZES[variant]),)))
