"""The first tokens and the last ones.

    kept: positions 0 .. sinks - 1, and the last budget - sinks

The first tokens take the attention that a query has to leave somewhere; without them a model that was
trained to see them breaks down. Xiao et al., "Efficient Streaming Language Models with Attention Sinks"
(StreamingLLM), ICLR 2024, section 3.2, with 4 sinks. There positions are counted anew within the cache; here
a token keeps the position that it has in its text.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.decoding.cache import Cache
from effjax.decoding.policies.evicting import ALWAYS, Evicting
from effjax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Window(Evicting):
    """Keeps the sinks and the latest tokens.

    Attributes:
      sinks: first tokens of each sequence that always stay.
    """

    sinks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sinks < self.budget:
            raise UsageError(
                f"budget={self.budget} slots hold no window beside sinks={self.sinks}: give more slots than "
                f"sinks."
            )

    def worth(self, cache: Cache, newest: Int[Array, " b"]) -> Float[Array, "b slots"]:
        """The later the more, and sinks the most."""
        at = cache.positions
        return jnp.where(at < self.sinks, ALWAYS, at.astype(jnp.float32))
