"""DGQ (Ryu et al. 2025): a diffusion network whose inputs are rounded in groups, so that outliers keep apart.

    python -m experiments.compress --workdir=runs/dit --recipe=configs/compress/dgq.py:w4a6 --out=runs/w4a6

`w8a8`, `w4a8`, `w4a6`, `w8a4`
    Bits of weights, to the nearest, in groups of 32 where they are 4; bits of what enters products of tokens,
    in 8 groups. The condition keeps its inputs.
"""

from ml_collections import ConfigDict

VARIANTS = ("w8a8", "w4a8", "w4a6", "w8a4")


def get_config(variant: str = "w8a8") -> ConfigDict:
    """Returns the recipe of a variant."""
    weights, inputs = (int(bits) for bits in variant[1:].split("a"))
    layout = dict(kind="uniform", bits=weights, group=0 if weights == 8 else 32)
    groups = dict(kind="dgq", bits=inputs, groups=8, kernels=("blocks/(mixer|ffn)/.*",))
    return ConfigDict(dict(steps=(dict(kind="round", layout=layout, kernels=("blocks/.*",)), groups)))
