"""Where a model's attention shifts within a text, told by the model itself while it reads.

A policy that keeps and reads everything, and whose state is then the ratio that boundaries are learned from;
the cache holds the keys beside it. See `effjax.mixers.boundaries`.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from effjax.decoding.cache import Cache
from effjax.decoding.policies.policy import Policy
from effjax.errors import UsageError
from effjax.mixers.boundaries import attention_ratio


@dataclasses.dataclass(frozen=True)
class AttentionShift(Policy):
    """Tells of every slot how unequally later tokens look at what lies before and behind it.

    Attributes:
      window: tokens on either side.
    """

    window: int = 4

    watches: ClassVar[bool] = True

    def init(self, batch: int, slots: int, groups: int, head_dim: int, dtype: DTypeLike) -> Cache:
        """An empty cache, with a ratio of 0 for every slot."""
        cache = super().init(batch, slots, groups, head_dim, dtype)
        return dataclasses.replace(cache, state=jnp.zeros((batch, slots), jnp.float32))

    def axes(self) -> Cache:
        """Names of the axes."""
        return dataclasses.replace(super().axes(), state=("batch", "slots"))

    def observe(self, cache: Cache, weights: Float[Array, "b h n s"]) -> Cache:
        """Tells, once the text is there.

        Raises:
          UsageError: for a text that comes in pieces, or is shorter than the cache.
        """
        if weights.shape[2] != cache.slots:
            raise UsageError(
                f"{weights.shape[2]} tokens came into a cache of {cache.slots} slots: what later tokens look "
                f"at is known of whole texts alone, in caches of their length."
            )
        return dataclasses.replace(cache, state=attention_ratio(weights, self.window))
