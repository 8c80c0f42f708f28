"""Training through rounding (Krishnamoorthi 2018): from a trained run to 8 or 4 bits of weights and inputs.

    python -m experiments.compress --workdir=runs/RUN --recipe=configs/compress/qat.py:int4 --out=runs/fake
    python -m experiments.train --config=CONFIG-OF-RUN --config.train.start=runs/fake \\
        --config.train.steps="300 steps" --config.optimizer.lr=1e-4 --workdir=runs/tuned
    python -m experiments.compress --workdir=runs/tuned --recipe=configs/compress/qat.py:freeze --out=runs/4

The first leaves float weights that are used as if they were codes, the second trains them, a short run with a
small learning rate, the third turns them into codes.

`int8`, `int4`
    Weights in so many bits, a scale for each output; what enters in 8, an affine range that training follows.
`freeze`
    Codes of what was trained.
"""

from ml_collections import ConfigDict

VARIANTS = ("int8", "int4", "freeze")


def get_config(variant: str = "int8") -> ConfigDict:
    """Returns the recipe of a variant."""
    if variant == "freeze":
        return ConfigDict(dict(steps=(dict(kind="freeze"),)))
    layout = dict(weights=dict(bits=int(variant.removeprefix("int")), group=0))
    return ConfigDict(dict(steps=(dict(kind="fake_quantise", layout=layout, kernels=("blocks/.*",)),)))
