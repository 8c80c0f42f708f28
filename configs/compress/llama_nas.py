"""LLaMA-NAS: fewer layers and narrower ones, found by NSGA-II among the networks inside a trained one.

    python -m experiments.train --config=configs/language/sorted_lm.py:pydocs --workdir=runs/sorted
    python -m experiments.compress --workdir=runs/sorted --out=runs/found \\
        --recipe=configs/compress/llama_nas.py:pydocs

`smoke`
    A few candidates: seconds.
`pydocs`
    Half to all of the layers, of each a quarter to all of the hidden units; two thirds of the MACs: 3 minutes
    on 2 CPU cores, and a perplexity of 4.49 (4.35 before).
`published`
    The space of the paper: of Llama 2 7B 24, 28 or 32 layers with 5504 or 11,008 hidden units each. Not run
    here.
"""

from ml_collections import ConfigDict

VARIANTS = ("smoke", "pydocs", "published")


def get_config(variant: str = "pydocs") -> ConfigDict:
    """Returns the recipe of a variant."""
    how: dict[str, object] = {}
    if variant != "published":
        how = dict(depths=(0.5, 0.75, 1.0), widths=(0.25, 0.5, 0.75, 1.0))
    if variant == "smoke":
        how |= dict(population=4, evaluations=8, generations=2, batches=1)
    return ConfigDict(dict(steps=(dict(kind="llama_nas", **how),)))
