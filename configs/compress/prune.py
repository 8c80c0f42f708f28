"""Structured pruning to half of the multiply-accumulates, and a short recovery taught by the whole network.

    python -m experiments.compress --workdir=runs/RUN --out=runs/half \\
        --recipe=configs/compress/prune.py:taylor

`taylor`
    Heads and hidden units by the squared change of the loss, in four rounds with training between.
`nvit`
    All five kinds of units of NViT: channels of heads go too, and channels of the stream out of all layers.
    For ViT and LM, whose stream can be narrowed. 98.33% of digits, 98.06% before.
`nvit-divided`
    The same with the numbers that the published code divides saliencies by, which are DeiT-Base's: of the ViT
    of digits a third of the stream goes; 96.94%.
`magnitude`, `random`
    The same by the norm of weights, or by chance.
`taylor-once`, `magnitude-once`, `random-once`
    In one round and without any training.
`optin`
    By the error along the trajectory, without any training either.
`seconds`
    As `taylor`, to half of the time that layers take by a table measured on this device.
"""

from ml_collections import ConfigDict

ONCE = ("taylor-once", "magnitude-once", "random-once", "optin")
VARIANTS = ("taylor", "nvit", "nvit-divided", "magnitude", "random", "seconds", *ONCE)


def get_config(variant: str = "taylor") -> ConfigDict:
    """Returns the recipe of a variant."""
    name, _, how = variant.partition("-")
    score: dict[str, object] = dict(kind="taylor" if name in ("nvit", "seconds") else name)
    least = dict(heads=1, head_step=1, hidden=8, hidden_step=8)
    step = dict(kind="prune", left=0.5, score=score, least=least)
    if how == "divided":
        score["divided"] = dict(stream=12.0, heads=6.0, qk=2.0)
    if name == "nvit":
        step["kinds"] = ("heads", "qk", "value", "hidden", "stream")
    if name == "seconds":
        step["cost"] = "seconds"
    if how == "once" or name == "optin":
        return ConfigDict(dict(steps=(step,)))
    step |= dict(rounds=4, tune=dict(steps=100))
    return ConfigDict(dict(steps=(step, dict(kind="recover", how=dict(steps=600)))))
