"""SPDF (Thangarasa et al. 2023, arXiv:2303.10464): pre-training with zeros, fine-tuning without.

    python -m experiments.train --config=configs/language/spdf.py:pydocs-75 --workdir=runs/sparse
    python -m experiments.compress --workdir=runs/sparse --recipe=configs/compress/densify.py --out=runs/dense
    python -m experiments.train --config=configs/language/spdf.py:pydocs-fine \\
        --config.train.start=runs/dense --workdir=runs/fine

The first trains a network whose matrices of attention and perceptrons have zeros at drawn places, as many in
each, the second lets the zeros go, the third trains all numbers. Embeddings, norms and the head are dense
throughout. Without the second the third is fine-tuning with the zeros.

`smoke`
    20 steps of a toy, three quarters of its numbers zero: seconds.
`pydocs-0`, `pydocs-50`, `pydocs-75`
    The model of `configs/language/lm.py:pydocs` on four fifths of the text, so many hundredths zero, 300
    steps.
`pydocs-fine`
    60 steps on the last fifth of the text, with a rate ten times smaller.

The paper pre-trains with 20 tokens a parameter and tunes on other tasks; rates and lengths here are ours.
"""

from ml_collections import ConfigDict

from configs.language import lm

VARIANTS = ("smoke", "pydocs-0", "pydocs-50", "pydocs-75", "pydocs-fine")


def get_config(variant: str = "pydocs-75") -> ConfigDict:
    """Returns the experiment of one variant."""
    config = lm.get_config(variant.split("-")[0])
    fine = variant == "pydocs-fine"
    if variant != "smoke":
        config.data.source.split = "train[80%:]" if fine else "train[:80%]"
        config.train.steps = "60 steps" if fine else "300 steps"
    if fine:
        config.optimizer.lr = 3e-4
    sparsity = {"smoke": 0.75, "pydocs-50": 0.5, "pydocs-75": 0.75}.get(variant)
    if sparsity is not None:
        # A key of a config has no dot, so that `blocks/.*` is not to be had.
        config.storage = {"blocks/[a-z_/]+": dict(kind="masked", sparsity=sparsity)}
    return config
