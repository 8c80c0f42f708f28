"""Where a model's attention shifts within a text, told by the model itself while it reads.

A policy that keeps and reads everything, and whose state is then the ratio that boundaries are learned from;
the cache holds the keys beside it. See `effjax.mixers.boundaries`.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.decoding.cache import Cache
from effjax.decoding.policies.policy import Look, Policy, Sizes
from effjax.errors import UsageError
from effjax.mixers.boundaries import attention_ratio


@dataclasses.dataclass(frozen=True)
class AttentionShift(Policy):
    """Tells of every slot how unequally later tokens look at what lies before and behind it.

    Attributes:
      window: tokens on either side.
    """

    window: int = 4

    def begun(self, cache: Cache, sizes: Sizes) -> Cache:
        """An empty cache, with a ratio of 0 for every slot."""
        cache = super().begun(cache, sizes)
        return dataclasses.replace(cache, state=jnp.zeros((sizes.batch, sizes.slots), jnp.float32))

    def axes(self) -> Cache:
        """Names of the axes."""
        return dataclasses.replace(super().axes(), state=("batch", "slots"))

    def looked(
        self,
        cache: Cache,
        keys: Float[Array, "b s groups d"],
        values: Float[Array, "b s groups e"],
        tokens: int,
        look: Look,
    ) -> tuple[Float[Array, "b n h e"], Cache]:
        """Tells, once the text is there.

        Raises:
          UsageError: for a text that comes in pieces, or is shorter than the cache.
        """
        if tokens != cache.slots:
            raise UsageError(
                f"{tokens} tokens came into a cache of {cache.slots} slots: what later tokens look at is "
                f"known of whole texts alone, in caches of their length."
            )
        y, weights = look(keys, values, cache.positions, cache.size, tell=True)
        assert weights is not None
        return y, dataclasses.replace(cache, state=attention_ratio(weights, self.window))
