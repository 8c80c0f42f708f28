"""A language model in which smaller ones lie, all trained at once by SortedNet: what LLaMA-NAS searches.

    python -m experiments.train --config=configs/language/sorted_lm.py:VARIANT --workdir=runs/sorted
    python -m experiments.compress --workdir=runs/sorted --out=runs/found \\
        --recipe=configs/compress/llama_nas.py:pydocs

`smoke`
    20 steps of a toy: seconds.
`pydocs`
    The model of `configs/language/lm.py:pydocs` and those with a quarter to all of its hidden units and half
    to all of its layers, 12 in all, two a step: an hour on 2 CPU cores, and a perplexity of
    4.35 for all of it.
`8b`
    Llama 3 8B with half or all of its hidden units and three quarters to all of its layers. Not run here.
"""

import itertools

from ml_collections import ConfigDict

from configs.language import lm

WIDTHS = {"smoke": (0.5, 1.0), "pydocs": (0.25, 0.5, 0.75, 1.0), "8b": (0.5, 1.0)}
DEPTHS = {"smoke": (0.5, 1.0), "pydocs": (0.5, 0.75, 1.0), "8b": (0.75, 0.875, 1.0)}
VARIANTS = tuple(WIDTHS)


def get_config(variant: str = "pydocs") -> ConfigDict:
    """Returns the experiment of one variant."""
    config = lm.get_config(variant)
    networks = tuple(
        dict(hidden=hidden, depth=depth)
        for hidden, depth in itertools.product(WIDTHS[variant], DEPTHS[variant])
    )
    config.train.nested = dict(networks=networks, draws=2)
    return config
