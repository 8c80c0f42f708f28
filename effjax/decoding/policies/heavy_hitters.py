"""The tokens that were attended to most, and the last ones.

    score_j = sum over queries i so far of p_ij            (of all heads that share the key)
    kept: the last `recent` tokens, and of the others the budget - recent of largest score

Each layer and key/value head keeps its own. Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative
Inference of Large Language Models", NeurIPS 2023, section 4 and algorithm 1; half of the budget is recent
there.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.decoding.cache import Cache
from effjax.decoding.policies.evicting import ALWAYS, Evicting, numbers, of_each_head
from effjax.decoding.policies.policy import Look, Sizes
from effjax.decoding.policies.taken import look_and_sum
from effjax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class HeavyHitters(Evicting):
    """Keeps heavy hitters and the latest tokens.

    Attributes:
      recent: latest tokens that always stay; None means half of the budget.
    """

    recent: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recent is not None and not 1 <= self.recent <= self.budget:
            raise UsageError(f"recent={self.recent} must be between 1 and budget={self.budget}.")

    def begun(self, cache: Cache, sizes: Sizes) -> Cache:
        """An empty cache with scores."""
        cache = super().begun(cache, sizes)
        return of_each_head(cache, sizes.groups, score=numbers(sizes.batch, cache.slots, sizes.groups))

    def axes(self) -> Cache:
        """Names of the axes."""
        each = ("batch", "slots", "kv_heads")
        return dataclasses.replace(super().axes(), positions=each, score=each)

    def worth(self, cache: Cache, newest: Int[Array, " b"]) -> Float[Array, "b slots groups"]:
        """The score; the latest tokens are worth most."""
        recent = max(self.budget // 2, 1) if self.recent is None else self.recent
        at = cache.positions
        # The token that is being added is among the latest: `newest` counts.
        late = at > newest[:, None, None] - recent
        return jnp.where(late, ALWAYS, cache.score)

    def looked(
        self,
        cache: Cache,
        keys: Float[Array, "b s groups d"],
        values: Float[Array, "b s groups e"],
        tokens: int,
        look: Look,
    ) -> tuple[Float[Array, "b n h e"], Cache]:
        """Adds to the scores what is taken now."""
        y, taken = look_and_sum(look, keys, values, cache.positions, cache.size, tokens)
        return y, dataclasses.replace(cache, score=cache.score + taken)
