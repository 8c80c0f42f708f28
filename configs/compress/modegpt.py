"""MoDeGPT: layers made narrower in closed form, from statistics of 32 batches and without any training.

    python -m experiments.compress --workdir=runs/RUN --out=runs/narrow \\
        --recipe=configs/compress/modegpt.py:m70

`m90`, `m80`, `m70`, `m50`
    So many percent of the multiply-accumulates are left. epsilon is 1, which spares no layer wholly; the
    step's own 0.1 is meant for many layers.
"""

from ml_collections import ConfigDict

VARIANTS = ("m90", "m80", "m70", "m50")


def get_config(variant: str = "m70") -> ConfigDict:
    """Returns the recipe of a variant."""
    step = dict(kind="modegpt", left=int(variant.removeprefix("m")) / 100, batches=32, epsilon=1.0)
    return ConfigDict(dict(steps=(step,)))
