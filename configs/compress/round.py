"""Rounding to the nearest: weights in few bits by themselves alone, without data.

    python -m experiments.compress --workdir=runs/RUN --recipe=configs/compress/round.py:int4 --out=runs/int4

`int8`
    Every kernel in 8 bits, symmetric, a scale for each output.
`int4`, `int3`, `int2`
    Every kernel in so many bits, affine, a scale and a zero for 64 weights, whose range is narrowed to the
    least squared error. `--recipe.steps[0].layout.group=128` takes more.

Tables and kernels with few inputs stay as they are: a pixel that is embedded alone has no group. Seconds.

    bits                                             float    8        4        3        2
    accuracy of `vision/vit.py:digits`, 360 digits   98.06%   98.06%   98.33%   96.67%   85.56%
    perplexity of `language/moe.py:pydocs-dense`     4.046    4.046    4.061    4.130    4.615
    Fréchet distance of `diffusion/dit.py:digits`    0.370    0.370    0.362
"""

from ml_collections import ConfigDict

VARIANTS = ("int8", "int4", "int3", "int2")


def get_config(variant: str = "int8") -> ConfigDict:
    """Returns the recipe of a variant."""
    bits = int(variant.removeprefix("int"))
    layout = dict(kind="uniform", bits=bits, group=0 if bits == 8 else 64, symmetric=bits == 8)
    step = dict(kind="round", layout=layout, kernels=("blocks/.*",), range="min_max" if bits == 8 else "mse")
    return ConfigDict(dict(steps=(step,)))
