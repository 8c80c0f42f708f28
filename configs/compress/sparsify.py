"""Zeros by the weights alone, without any training: which numbers of all matrices of the blocks go.

    python -m experiments.compress --workdir=runs/RUN --out=runs/sparse \\
        --recipe=configs/compress/sparsify.py:dimap

`random`, `magnitude`, `global`, `lamp`, `dimap`
    60 of 100 numbers: drawn, the smallest of each matrix, of all, by their share of a matrix, of a module.
`2of4`
    The two larger of every four neighbours.
"""

from ml_collections import ConfigDict

VARIANTS = ("random", "magnitude", "global", "lamp", "dimap", "2of4")


def get_config(variant: str = "dimap") -> ConfigDict:
    """Returns the recipe of a variant."""
    how = dict(pattern=(2, 4)) if variant == "2of4" else dict(sparsity=0.6, worth=variant)
    return ConfigDict(dict(steps=(dict(kind="sparsify", **how),)))
