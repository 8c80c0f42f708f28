"""BCT (Dong and Chen 2023): weights and what enters in blocks with a power of two each, without data.

    python -m experiments.compress --workdir=runs/RUN --recipe=configs/compress/bct.py:int8 --out=runs/bct

`int8`, `int4`
    Bits of the weights, in tiles of 32 x 32; what enters has 8, in blocks of 32.
"""

from ml_collections import ConfigDict

VARIANTS = ("int8", "int4")


def get_config(variant: str = "int8") -> ConfigDict:
    """Returns the recipe of a variant."""
    layout = dict(kind="shift", bits=int(variant.removeprefix("int")), rows=32, columns=32, inputs=8)
    return ConfigDict(dict(steps=(dict(kind="round", layout=layout, kernels=("blocks/.*",)),)))
