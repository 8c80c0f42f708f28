"""LUT-GEMM (Park et al. 2022): weights as sums of scales with signs, found by an alternating fit.

    python -m experiments.compress --workdir=runs/RUN --recipe=configs/compress/lut_gemm.py:b3 --out=runs/b3

`b4`, `b3`, `b2`
    So many planes of signs, with scales for 64 weights. Seconds.
"""

from ml_collections import ConfigDict

VARIANTS = ("b4", "b3", "b2")


def get_config(variant: str = "b3") -> ConfigDict:
    """Returns the recipe of a variant."""
    layout = dict(kind="binary_coding", bits=int(variant[1:]), group=64)
    return ConfigDict(dict(steps=(dict(kind="round", layout=layout, kernels=("blocks/.*",)),)))
