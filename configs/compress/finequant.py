"""FineQuant (Kim et al. 2023): groups as fine as the weights of a matrix ask for, without data.

    python -m experiments.compress --workdir=runs/RUN --recipe=configs/compress/finequant.py --out=runs/fine

4 bits, symmetric. Seconds.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the recipe."""
    return ConfigDict(dict(steps=(dict(kind="finequant", kernels=("blocks/.*",)),)))
