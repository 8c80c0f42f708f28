"""Averages that add up across micro-batches, evaluation batches and hosts."""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped


@flax.struct.dataclass
class Mean:
    """A sum and how many items it is over, both scalars; their quotient is the average."""

    # Not annotated as arrays, because the same class also carries their shapes and shardings.
    total: Any
    count: Any

    @classmethod
    def of(cls, values: Shaped[Array, "*shape"], weights: Float[Array, "*shape"] | None = None) -> "Mean":
        """Weighted average of `values`, in float32."""
        values = values.astype(jnp.float32)
        if weights is None:
            return cls(jnp.sum(values), jnp.asarray(values.size, jnp.float32))
        weights = weights.astype(jnp.float32)
        # A masked row may hold anything, also NaN, and must not count.
        return cls(jnp.sum(jnp.where(weights > 0, values * weights, 0.0)), jnp.sum(weights))

    def value(self) -> Float[Array, ""]:
        """The average; 0 where nothing was counted."""
        return self.total / jnp.maximum(self.count, 1e-9)


Means = Mapping[str, Mean]


def add(a: Means, b: Means) -> Means:
    """Pools two sets of averages of the same names."""
    return jax.tree.map(jnp.add, a, b)


def values(means: Means) -> dict[str, Float[Array, ""]]:
    """The averages themselves."""
    return {name: mean.value() for name, mean in means.items()}
