"""Token transforming: every reduction is a matrix, and a dense one loses least.

    Y = W X,   W [M, N]
    pruning   one 1 in each row, at most one in each column
    merging   one entry in each column
    here      W_mn = A_mn s_n / sum_j A_mj s_j,   A_{:n} = softmax_m(cos(k_m, k_n) / tau)

The M anchors m are the tokens that get most attention from all. Each token divides its size s_n among the
anchors by similarity, so that sizes add up to what they were and rows to 1: fields that are constant stay so.
As tau goes to 0 each token goes whole to its nearest anchor, which is merging; with M = N that is itself, and
nothing happens. For dense outputs each token is made of the anchors it was divided among: X ~ A^T Y.

`matrix` writes what any method plans as such a W. DeiT-S at the published 40% fewer MACs, at layers of our
choice: `TokenTransforming(keep=0.7, layers=(2, 5, 8))`.

Source: Zeng et al., "Token Transforming: A Unified and Training-Free Token Compression Framework for Vision
Transformer Acceleration", arXiv:2506.05709, 2025. Only its abstract could be read here and no code is
published: that W is dense and many-to-many, needs no training and subsumes pruning and merging is theirs;
score, similarity, temperature, the axis of the softmax and the layers are ours.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.errors import UsageError
from effjax.mixers.stats import Stats
from effjax.tokens.amounts import Amount
from effjax.tokens.assignment import Mixture, Plan
from effjax.tokens.bipartite import cosine, normalised, order
from effjax.tokens.point import Place, Where
from effjax.tokens.tokens import Tokens, rows
from effjax.tokens.tome import metric_of


def matrix(plan: Plan, tokens: Tokens) -> Float[Array, "b m n"]:
    """What a plan does to the tokens between the ends, as a matrix."""
    if isinstance(plan, Mixture):
        return plan.weights
    sizes = tokens.inner(tokens.size)  # [B, n]
    every = jnp.broadcast_to(jnp.eye(tokens.count)[None], (sizes.shape[0], tokens.count, tokens.count))
    if plan.into is None:
        return plan.total(every)
    moved = plan.total(every * sizes[:, :, None])  # [B, m, n]
    return moved / jnp.sum(moved, axis=-1, keepdims=True)


def transformation(
    similarity: Float[Array, "b m n"], sizes: Float[Array, "b n"], temperature: float
) -> tuple[Float[Array, "b m n"], Float[Array, "b m"], Float[Array, "b n m"]]:
    """W, the sizes of the new tokens, and how the old ones are made of the new."""
    divided = jax.nn.softmax(similarity / temperature, axis=1)  # [B, M, N]
    mass = divided * sizes[:, None, :]
    new = jnp.sum(mass, axis=-1)  # [B, M]
    return mass / new[:, :, None], new, divided.swapaxes(1, 2)


@dataclasses.dataclass(frozen=True)
class TokenTransforming(Amount):
    """Divides tokens among anchors.

    Attributes:
      keep, remove, layers: see `Amount`.
      temperature: of the softmax over anchors; small ones merge, large ones average.
      metric: what tokens are compared by: the keys' mean over heads, or what goes into the mixer.
      proportional: whether attention counts sizes.
    """

    temperature: float = 0.03
    metric: Literal["keys", "features"] = "keys"
    proportional: bool = True

    place: ClassVar[Place] = "after_mixer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise UsageError(f"temperature={self.temperature:g} must be positive.")

    @property
    def needs(self) -> tuple[str, ...]:
        """What is read of the mixer."""
        return ("attention", "keys") if self.metric == "keys" else ("attention",)

    def plan(self, tokens: Tokens, stats: Stats, where: Where) -> Mixture | None:
        """Ranks tokens by attention, and compares all with the first."""
        n = tokens.count
        remove = self.removed(tokens)
        if not remove:
            return None
        seen = jnp.mean(jax.lax.stop_gradient(stats.attention), axis=(1, 2))  # [B, N]
        ranks = order(tokens.inner(seen))  # [B, n]
        anchors = jnp.sort(ranks[:, : n - remove], axis=-1)  # [B, M]
        metric = normalised(tokens.inner(metric_of(stats, self.metric)))  # [B, n, D]
        similarity = cosine(rows(metric, anchors), metric)  # [B, M, n]
        return Mixture(*transformation(similarity, tokens.inner(tokens.size), self.temperature))
