"""Integers times integers (Krishnamoorthi 2018): 8 bits of weights and of what enters them.

    python -m experiments.compress --workdir=runs/RUN --recipe=configs/compress/integers.py --out=runs/w8a8

`static`
    What enters has an affine range, the moving average over 100 batches of training data.
`mse`
    That range is narrowed to the least squared error.
`token`
    Every row has a scale of its own, found when it enters; no data are needed.
"""

from ml_collections import ConfigDict

VARIANTS = ("static", "mse", "token")


def get_config(variant: str = "static") -> ConfigDict:
    """Returns the recipe of a variant."""
    weights = dict(kind="round", layout=dict(kind="uniform", bits=8, group=0), kernels=("blocks/.*",))
    kind = "token" if variant == "token" else "static"
    how = "mse" if variant == "mse" else "ema"
    return ConfigDict(dict(steps=(weights, dict(kind="calibrate_inputs", inputs=dict(kind=kind), how=how))))
