"""The baselines that leave tokens out: at random, or those that the class token looks at least.

random    keep any M
class     keep the M of largest sum_heads A_{class, n}        Liang et al. 2022, EViT, section 3.2
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.mixers.stats import Stats
from effjax.tokens.amounts import Amount
from effjax.tokens.assignment import Assignment
from effjax.tokens.bipartite import order
from effjax.tokens.point import Place, Where
from effjax.tokens.tokens import Tokens


def keep_best(scores: Float[Array, "b n"], remove: int, tokens: Tokens) -> Assignment:
    """Drops the `remove` tokens of least score; the others keep their order."""
    fixed = tokens.fixed()
    if fixed is not None:
        scores = jnp.where(fixed, jnp.inf, scores)
    ranks = order(scores)  # [B, N]
    kept = scores.shape[1] - remove
    return Assignment(jnp.sort(ranks[:, :kept], axis=-1), ranks[:, kept:])


@dataclasses.dataclass(frozen=True)
class RandomDrop(Amount):
    """Leaves out tokens at random: what every method must beat.

    Attributes:
      keep, remove, layers: see `Amount`.
      seed: of the draw, which is another one at every layer and for every example.
    """

    seed: int = 0

    needs: ClassVar[tuple[str, ...]] = ()
    place: ClassVar[Place] = "after_mixer"
    proportional: ClassVar[bool] = False

    def plan(self, tokens: Tokens, stats: Stats, where: Where) -> Assignment | None:
        """Draws a score for every token."""
        remove = self.removed(tokens)
        if not remove:
            return None
        key = jax.random.fold_in(jax.random.key(self.seed), where.layer)
        return keep_best(jax.random.uniform(key, (tokens.x.shape[0], tokens.count)), remove, tokens)


@dataclasses.dataclass(frozen=True)
class ClassAttention(Amount):
    """Leaves out what the class token attends to least; without a class token, what all tokens do.

    Attributes:
      keep, remove, layers: see `Amount`.
    """

    needs: ClassVar[tuple[str, ...]] = ("attention",)
    place: ClassVar[Place] = "after_mixer"
    proportional: ClassVar[bool] = False

    def plan(self, tokens: Tokens, stats: Stats, where: Where) -> Assignment | None:
        """Ranks tokens by the attention that they get."""
        remove = self.removed(tokens)
        if not remove:
            return None
        queries = stats.attention[:, :, :1] if tokens.ends[0] else stats.attention  # [B, H, Q, N]
        scores = jnp.mean(queries, axis=(1, 2))  # [B, N]
        return keep_best(tokens.inner(jax.lax.stop_gradient(scores)), remove, tokens)
