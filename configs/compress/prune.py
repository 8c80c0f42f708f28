"""Structured pruning to half of the multiply-accumulates, and a short recovery taught by the whole network.

    python -m experiments.compress --workdir=runs/RUN --out=runs/half \\
        --recipe=configs/compress/prune.py:taylor

`taylor`
    Heads and hidden units by the squared change of the loss, in four rounds with training between.
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
VARIANTS = ("taylor", "magnitude", "random", "seconds", *ONCE)


def get_config(variant: str = "taylor") -> ConfigDict:
    """Returns the recipe of a variant."""
    score, _, once = variant.partition("-")
    least = dict(heads=1, head_step=1, hidden=8, hidden_step=8)
    step = dict(kind="prune", left=0.5, score=dict(kind=score), least=least)
    if variant == "seconds":
        step |= dict(cost="seconds", score=dict(kind="taylor"))
    if once or score == "optin":
        return ConfigDict(dict(steps=(step,)))
    step |= dict(rounds=4, tune=dict(steps=100))
    return ConfigDict(dict(steps=(step, dict(kind="recover", how=dict(steps=600)))))
