"""Graph-based token propagation: what a token knew goes to its neighbours before it goes.

    G = 8 neighbours on the grid, or the k tokens of largest cosine, or both;   G_ij in {0, 1}
    P = D^(-1/2) G D^(-1/2),   D = diag(sum_j G_ij)
    score_n = max_h A^h_nn  max_h sum_m A^h_mn
    the r tokens of smallest score go:   x_stay <- x_stay + alpha P_{stay, gone} x_gone,   sizes likewise

A token that attends to itself is hard to make of others, and one that is attended to is hard to do without.
The graph is made once, of the tokens that enter the first layer that reduces (in the paper the embedded
patches), and its rows and columns are left out as tokens are. In attention the largest `share` of a head's
weights count alone, and sizes add their logarithm to the logits. It needs no training.

The graph of largest cosines has k ones in each row and is not symmetric: P then is similar to the stochastic
matrix D^-1 G, whose spectral radius is 1, but is not symmetric either. Sizes of tokens that stay grow by
alpha P: their sum is not what it was.

Published for DeiT-B, with both graphs and sizes, as (remove, share, alpha): (1, 0.8, 0.1), (4, 1.0, 0.4),
(8, 0.6, 0.1), (11, 0.8, 0.3), (14, 0.8, 0.3); k is 8 by default. `GTP(remove=8)` takes DeiT-S from 4.60 to
3.44 GMACs.

Source: Xu et al., "GTP-ViT: Efficient Vision Transformers via Graph-based Token Propagation", WACV 2024,
section 3, and its published code.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.errors import UsageError
from effjax.mixers.stats import Stats
from effjax.tokens.amounts import Amount
from effjax.tokens.assignment import Assignment
from effjax.tokens.bipartite import cosine, normalised, order
from effjax.tokens.point import Place, Where
from effjax.tokens.tokens import Tokens, rows

Graph = Literal["mixed", "spatial", "semantic"]


def grid_graph(grid: tuple[int, int]) -> Float[Array, "n n"]:
    """Which places of a grid touch, at an edge or at a corner."""
    row, column = (places.reshape(-1) for places in jnp.indices(grid))  # [n]
    near = [jnp.abs(axis[:, None] - axis[None, :]) for axis in (row, column)]
    return (jnp.maximum(*near) == 1).astype(jnp.float32)


def nearest_graph(x: Float[Array, "b n c"], neighbours: int) -> Float[Array, "b n n"]:
    """Which tokens have the largest cosines with each (row): as many ones a row as it has neighbours."""
    metric = normalised(x)
    similarity = cosine(metric, metric) - 4 * jnp.eye(x.shape[1])[None]  # nobody is its own neighbour
    least = jax.lax.top_k(similarity, neighbours)[0][:, :, -1:]  # [B, n, 1]
    return (similarity >= least).astype(jnp.float32)


def propagation(graph: Float[Array, "b n n"]) -> Float[Array, "b n n"]:
    """D^(-1/2) G D^(-1/2), by the sums of the rows."""
    scale = jax.lax.rsqrt(jnp.sum(graph, axis=-1))  # [B, n]
    return scale[:, :, None] * graph * scale[:, None, :]


def scores(attention: Float[Array, "b h n n"]) -> Float[Array, "b n"]:
    """How much a token keeps to itself times how much all take from it."""
    own = jnp.max(jnp.diagonal(attention, axis1=2, axis2=3), axis=1)  # [B, N]
    return own * jnp.max(jnp.sum(attention, axis=2), axis=1)


@dataclasses.dataclass(frozen=True)
class GTP(Amount):
    """Propagates the tokens of least score to their neighbours.

    Attributes:
      keep, remove, layers: see `Amount`.
      alpha: how much of what goes its neighbours take on.
      graph: who neighbours are.
      neighbours: that a token has by cosine.
      share: of each head's weights of attention those that count, the largest.
      proportional: whether attention counts sizes.
    """

    alpha: float = 0.1
    graph: Graph = "mixed"
    neighbours: int = 8
    share: float | None = None
    proportional: bool = True

    needs: ClassVar[tuple[str, ...]] = ("attention",)
    place: ClassVar[Place] = "after_mixer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share is not None and not 0 < self.share <= 1:
            raise UsageError(f"share={self.share:g} is no share in (0, 1]: 0.6 counts three weights of five.")
        if self.neighbours < 1:
            raise UsageError(f"neighbours={self.neighbours} must be at least 1.")

    def plan(self, tokens: Tokens, stats: Stats, where: Where) -> Assignment | None:
        """Ranks tokens by attention, and finds the neighbours of those that go."""
        n = tokens.count
        remove = self.removed(tokens)
        if not remove:
            return None
        graph, places = self._graph(tokens) if tokens.carried is None else tokens.carried
        attention = jax.lax.stop_gradient(stats.attention)
        ranks = order(tokens.inner(scores(attention)))  # [B, n]
        keep, gone = jnp.sort(ranks[:, : n - remove], axis=-1), ranks[:, n - remove :]
        senders, takers = rows(places, gone), rows(places, keep)
        # The graph is carried whole, senders before takers: of a small graph all rows would be gathered.
        weights = jnp.take_along_axis(rows(graph, senders), takers[:, None, :], axis=2)  # [B, R, M]
        return Assignment(keep, gone, spread=self.alpha * weights.swapaxes(1, 2), carried=(graph, takers))

    def _graph(self, tokens: Tokens) -> tuple[Float[Array, "b n n"], Array]:
        """How tokens propagate, sender before taker, and the place of each token in it: all in their own."""
        n, b = tokens.count, tokens.x.shape[0]
        found = jnp.zeros((b, n, n), jnp.float32)
        if self.graph != "spatial":
            if self.neighbours >= n:
                raise UsageError(f"neighbours={self.neighbours} asks for more than the {n - 1} other tokens.")
            found = nearest_graph(tokens.inner(tokens.x), self.neighbours)
        if self.graph != "semantic":
            if not tokens.whole or tokens.grid is None:
                raise UsageError(
                    "neighbours on the grid are those of whole pictures: use graph='semantic', or reduce by "
                    "GTP first."
                )
            found = jnp.maximum(found, grid_graph(tokens.grid)[None])
        places = jnp.broadcast_to(jnp.arange(n)[None], (b, n))
        return propagation(found).swapaxes(1, 2), places
