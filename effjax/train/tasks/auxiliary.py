"""Losses that a model adds to its task's own: load balance of experts, a prior on their use.

A module sows them as `losses`, scalars that are means over its batch, weighted already:

    self.sow("losses", "load_balance", weight * value)

They are computed in training alone, and a scan over depth stacks them; what counts is their sum.
"""

from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp

from effjax.train.tasks.mean import Mean, Means

LOSSES = "losses"


def with_auxiliary(means: Means, collections: Mapping[str, Any]) -> tuple[Means, dict[str, Any]]:
    """Adds what was sown to `means["loss"]`, and names each kind; returns the other collections beside.

    Args:
      means: the task's own, over the examples of a batch.
      collections: what the model changed or sowed.
    """
    rest = {name: value for name, value in collections.items() if name != LOSSES}
    sums: dict[str, Any] = {}
    for path, value in flax.traverse_util.flatten_dict(collections.get(LOSSES, {})).items():
        total = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(value))
        sums[path[-1]] = sums.get(path[-1], 0.0) + total
    if not sums:
        return means, rest
    count = means["loss"].count
    added = {name: Mean(value * count, count) for name, value in sums.items()}
    loss = Mean(means["loss"].total + sum(mean.total for mean in added.values()), count)
    return {**means, **added, "loss": loss}, rest
