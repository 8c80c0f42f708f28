"""AxFormer: branches, heads and hidden units that the loss can do without go, without any training.

    python -m experiments.compress --workdir=runs/RUN --out=runs/lean \\
        --recipe=configs/compress/axformer.py:t5

`t0`, `t5`, `t20`
    The loss may rise by so many percent of the least that was found on the way.
`hard`
    `t5`, and then 4 keys a query in the layers that can do without the others.
`smoke`
    `t5` on one batch, and 64 hidden units at once.
"""

from typing import Any

from ml_collections import ConfigDict

VARIANTS = ("smoke", "t0", "t5", "t20", "hard")


def get_config(variant: str = "t5") -> ConfigDict:
    """Returns the recipe of a variant."""
    percent = 5 if variant in ("smoke", "hard") else int(variant.removeprefix("t"))
    step: dict[str, Any] = dict(kind="axformer", tolerance=percent / 100)
    if variant == "smoke":
        step |= dict(batches=1, group=64)
    if variant == "hard":
        step |= dict(top=4)
    return ConfigDict(dict(steps=(step,)))
