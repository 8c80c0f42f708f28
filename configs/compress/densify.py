"""Lets the zeros of a run go, so that all numbers train: the middle of SPDF (Thangarasa et al. 2023).

    python -m experiments.train --config=configs/language/spdf.py:pydocs-75 --workdir=runs/sparse
    python -m experiments.compress --workdir=runs/sparse --recipe=configs/compress/densify.py --out=runs/dense
    python -m experiments.train --config=configs/language/spdf.py:pydocs-fine \\
        --config.train.start=runs/dense --workdir=runs/fine

Numbers that were zero start from zero, and the optimiser afresh. Seconds.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the recipe."""
    return ConfigDict(dict(steps=(dict(kind="densify"),)))
