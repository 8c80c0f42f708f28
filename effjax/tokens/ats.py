"""Adaptive token sampling: the class token's attention is sampled, and what is drawn twice counts once.

    S_n = sum_h A^h_{class, n} |v_n|,   normalised to sum_n S_n = 1
    C = cumulative sum of S in rising order,   u_k evenly spread over its range,   k = 1 .. K
    the tokens whose C is nearest to some u_k stay, with the rows of A that are theirs:   y = A_stay v

Where a few tokens hold most of S many u_k fall on the same one, so how many stay depends on the picture; the
static number of tokens is K, and a mask says which exist. What stays was mixed with all the others once
more. It has no parameters, and gradients flow through the rows that stay.

`spread="ends"` is the published code: C is shifted and scaled to run from 0 to 1 and u_k from its second
value to 1, so that at least the least significant token goes at every layer. `spread="middles"` is the
equation of the paper, u_k = (2k - 1) / 2K: uniform significance and K = N keep every token. The published
code scales C over the padding too, which makes a picture's result depend on the others in its batch; here it
does not, and equals the published one of a batch of one picture. Without a class token S sums over all
queries.

DeiT-S in the published configuration: `ATS(layers=tuple(range(3, 12)))`, 4.6 to 2.9 GMACs on average.

Source: Fayyaz et al., "Adaptive Token Sampling for Efficient Vision Transformers", ECCV 2022, section 3.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from effjax.errors import UsageError
from effjax.mixers.stats import Stats
from effjax.tokens.amounts import at_layers
from effjax.tokens.assignment import Assignment
from effjax.tokens.compact import check_buckets
from effjax.tokens.point import Place, Where
from effjax.tokens.tokens import Tokens, rows

# Of the sum of all scores: a point in the middle between two tokens, but for rounding, takes the upper one.
TIE = 2e-6


def significance(
    attention: Float[Array, "b h n s"],
    values: Float[Array, "b s g d"],
    exists: Bool[Array, "b s"],
    class_token: bool,
) -> Float[Array, "b s"]:
    """What is attended to times how long its value is; tokens that do not exist have none."""
    if class_token:
        seen = jnp.sum(attention[:, :, 0], axis=1)  # [B, N]
    else:
        queries = exists[:, None, :, None].astype(attention.dtype)  # [B, 1, N, 1]
        seen = jnp.sum(attention * queries, axis=(1, 2))  # [B, N]
    length = jnp.sqrt(jnp.sum(values.astype(jnp.float32) ** 2, axis=(2, 3)))  # [B, N]
    return seen * length * exists


def sampled(
    scores: Float[Array, "b n"],
    exists: Bool[Array, "b n"],
    points: int,
    spread: Literal["ends", "middles"] = "ends",
) -> Bool[Array, "b n"]:
    """Which tokens evenly spread points of the inverse distribution function fall on.

    A token is nearest to the points between the middles to its neighbours' values, and how many points lie
    below a number is known in closed form: nothing is compared with anything.

    Args:
      scores: significance, not negative and 0 where no token exists.
      exists: the tokens.
      points: how many.
      spread: from where to where, see above.
    """
    order = jnp.argsort(jnp.where(exists, scores, -1.0), axis=-1, stable=True)  # [B, N], padding first
    ranked, there = rows(scores, order), rows(exists, order)  # [B, N]
    total, tiny = jnp.cumsum(ranked, axis=-1), jnp.finfo(scores.dtype).tiny
    if spread == "ends":
        # The first of the tokens is at 0, the second where the points begin.
        rank = jnp.where(there, jnp.cumsum(there, axis=-1), 0)  # [B, N], from 1
        total = total - _at(rank == 1, total)
    total = total / jnp.maximum(total[:, -1:], tiny)
    middle = (total[:, :-1] + total[:, 1:]) / 2  # [B, N - 1]
    if spread == "ends":
        start = _at(rank == 2, total)
        passed = (middle - start) / jnp.maximum((1 - start) / max(points - 1, 1), tiny)
    else:
        passed = (middle - TIE) * points - 0.5
    below = jnp.where(there[:, :-1], jnp.clip(jnp.ceil(passed), 0, points), 0)  # [B, N - 1]
    edges = jnp.pad(below, ((0, 0), (1, 0))), jnp.pad(below, ((0, 0), (0, 1)), constant_values=points)
    drawn = there & (edges[1] > edges[0])  # [B, N], by rank
    return jax.vmap(lambda row, at: jnp.zeros_like(row).at[at].set(row))(drawn, order)


def _at(place: Bool[Array, "b n"], values: Float[Array, "b n"]) -> Float[Array, "b 1"]:
    return jnp.sum(jnp.where(place, values, 0.0), axis=-1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class ATS:
    """Samples tokens by significance.

    Attributes:
      keep: points that are drawn, as a share of the original tokens: the most that can stay.
      layers: which ones reduce; None means all.
      spread: how the points lie, see above.
      buckets: numbers of tokens that the layers behind a reduction are also compiled for, see
        `effjax.tokens.compact`.
    """

    keep: float = 1.0
    layers: tuple[int, ...] | None = None
    spread: Literal["ends", "middles"] = "ends"
    buckets: tuple[int, ...] = ()

    needs: ClassVar[tuple[str, ...]] = ("attention", "values")
    place: ClassVar[Place] = "in_mixer"
    proportional: ClassVar[bool] = False
    adaptive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise UsageError(f"keep={self.keep:g} is no share in (0, 1]: 0.5 draws half as many.")
        check_buckets(self.buckets)

    def points(self, depth: int) -> dict[int, "ATS"]:
        """The layers that reduce."""
        return at_layers(self, depth, self.layers)

    def plan(self, tokens: Tokens, stats: Stats, where: Where) -> Assignment:
        """Draws tokens; they keep their order, and padding stands behind them."""
        points = max(round(self.keep * tokens.original), 1)
        exists = jnp.ones(tokens.x.shape[:2], bool) if tokens.mask is None else tokens.mask
        attention, values = jax.lax.stop_gradient((stats.attention, stats.values))
        scores = tokens.inner(significance(attention, values, exists, tokens.ends[0] > 0))  # [B, n]
        drawn = sampled(scores, tokens.inner(exists), points, self.spread)
        order = jnp.argsort(~drawn, axis=-1, stable=True)  # [B, n]
        keep, gone = jnp.split(order, [min(points, tokens.count)], axis=1)
        return Assignment(keep, gone, exists=rows(drawn, keep))
