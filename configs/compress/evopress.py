"""EvoPress: how many bits, zeros or branches each part of every layer has, by evolution under one budget.

    python -m experiments.compress --workdir=runs/RUN --out=runs/w3 \\
        --recipe=configs/compress/evopress.py:bits-3

`bits-3`
    2, 3 or 4 bits to the nearest for each kernel, as many bytes as 3 bits everywhere. On
    `language/moe.py:pydocs-dense` perplexity 4.134 for 4.135.
`zeros-60`
    50, 60 or 70 of 100 numbers of a kernel zero, the smallest; as many as 60 everywhere. There 4.75 for 4.87.
`branches`
    A quarter of the bytes of all mixers and FFNs left out: 7.053.
`smoke`
    `bits-3` with few generations: seconds.
"""

from typing import Any

from ml_collections import ConfigDict

VARIANTS = ("smoke", "bits-3", "zeros-60", "branches")


def get_config(variant: str = "bits-3") -> ConfigDict:
    """Returns the recipe of a variant."""
    if variant == "zeros-60":
        levels: tuple[Any, ...] = tuple(dict(kind="sparsify", sparsity=share) for share in (0.5, 0.6, 0.7))
        step: dict[str, Any] = dict(levels=levels, like=1)
    elif variant == "branches":
        step = dict(levels=(dict(kind="keep"), dict(kind="leave_out")), share=0.75, genes="branches")
    else:
        layouts = (dict(kind="uniform", bits=bits, group=64, symmetric=False) for bits in (4, 3, 2))
        rounded = (dict(kind="round", layout=layout, kernels=("blocks/.*",)) for layout in layouts)
        step = dict(levels=tuple(rounded), like=1)
        if variant == "smoke":
            step |= dict(generations=3, offspring=4)
    return ConfigDict(dict(steps=(dict(kind="evopress") | step,)))
