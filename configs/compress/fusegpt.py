"""FuseGPT: layers taken out, and fused into their neighbours by learned coefficients.

    python -m experiments.compress --workdir=runs/RUN --out=runs/fused \\
        --recipe=configs/compress/fusegpt.py:m75

`m75`, `m50`
    So many percent of the layers are left, with learning rates for small networks.
`m75-deleted`
    Three quarters of the layers, the others taken out and nothing trained.
`m75-recovered`
    The same, and then a recovery with as many steps as `m75` has.
`m75-adapters`
    As `m75`, with nothing taken up from the layer that goes: adapters alone.
`published-m75`
    The published settings for language models of billions of parameters, in batches of 8 texts. Not run here.
`smoke`
    `m75` on two batches: seconds.
"""

from typing import Any

from ml_collections import ConfigDict

VARIANTS = ("smoke", "m75", "m50", "m75-deleted", "m75-recovered", "m75-adapters", "published-m75")


def get_config(variant: str = "m75") -> ConfigDict:
    """Returns the recipe of a variant."""
    step: dict[str, Any] = dict(kind="fusegpt", left=0.5 if variant == "m50" else 0.75)
    if variant == "published-m75":
        return ConfigDict(dict(steps=(step,)))
    step |= dict(batches=80, epochs=4, rank=32, adapter_rank=32, coefficient_lr=5e-3, lr=1e-3)
    if variant == "smoke":
        step |= dict(batches=2, influence_batches=1)
    elif variant == "m75-adapters":
        step |= dict(rank=0)
    elif variant in ("m75-deleted", "m75-recovered"):
        step |= dict(epochs=0, batches=1)
    if variant != "m75-recovered":
        return ConfigDict(dict(steps=(step,)))
    return ConfigDict(dict(steps=(step, dict(kind="recover", how=dict(steps=320)))))
