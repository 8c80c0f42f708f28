"""EfficientQAT (Chen et al. 2024): blocks trained one by one into few bits, then step sizes end to end.

    python -m experiments.compress --workdir=runs/RUN --out=runs/w2 \\
        --recipe=configs/compress/efficientqat.py:w2

`w2`, `w3`
    2 or 3 bits in groups of 64, affine, with learning rates for small networks.
`published-w2`
    The published settings for language models of billions of parameters: 4096 texts, 2 epochs. Not run here.
"""

from typing import Any

from ml_collections import ConfigDict

VARIANTS = ("w2", "w3", "published-w2")


def get_config(variant: str = "w2") -> ConfigDict:
    """Returns the recipe of a variant."""
    size, _, bits = variant.rpartition("w")
    layout = dict(bits=int(bits), group=64, symmetric=False)
    step: dict[str, Any] = dict(kind="efficientqat", layout=layout, kernels=("blocks/.*",))
    if not size:
        step |= dict(batches=32, epochs=4, weight_lr=5e-4, grid_lr=1e-3, end_to_end=100, end_to_end_lr=5e-4)
    return ConfigDict(dict(steps=(step,)))
