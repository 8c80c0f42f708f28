"""Compressed experts: half of the experts that a token chooses become vectors, and a short recovery.

    python -m experiments.compress --workdir=runs/moe --out=runs/moe-compressed \\
        --recipe=configs/compress/compressed_experts.py:half

`half`
    A vector a matrix, as the published code has them, and 100 steps on the run's data.
`token`
    One vector, on the token, as in the paper's figure.
`none`
    The main experts alone, with the same recovery.
`half-untrained`
    Without the recovery: to be trained on with `config.train.start`.
`smoke`
    `half` with two steps: seconds.
"""

from ml_collections import ConfigDict

VARIANTS = ("smoke", "half", "token", "none", "half-untrained")


def get_config(variant: str = "half") -> ConfigDict:
    """Returns the recipe of a variant."""
    vectors = variant if variant in ("token", "none") else "matrix"
    step = dict(kind="compressed_experts", vectors=vectors)
    if variant == "half-untrained":
        return ConfigDict(dict(steps=(step,)))
    recover = dict(kind="recover", how=dict(steps=2 if variant == "smoke" else 100))
    return ConfigDict(dict(steps=(step, recover)))
