"""Spectrum-preserving token merging: crowds merge, loners stay.

    E_i = mean_j f(cos(k_i, k_j)),   f(c) = c - m where c > m, else alpha (e^(c - m) - 1)
    the 2 r tokens of highest energy, in falling order, are dealt in turn to A and B
    each a in A merges into argmax_{b in B} cos(k_a, k_b), weighed by sizes

A token in a large cluster of similar ones has high energy; one that is alone has little and is never
merged. The margin m falls linearly with depth. In the published code for DeiT the first half of the layers
deals out all tokens and merges the r closest pairs (`everyone="first_half"`); the equation (4) of the paper
has f(c) = c above the margin, the code the continuous form above. The code for images gives attention no
sizes (`proportional=False`).

Source: Tran et al., "Accelerating Transformers with Spectrum-Preserving Token Merging", NeurIPS 2024,
section 3.2, algorithm 1.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.mixers.stats import Stats
from effjax.tokens.amounts import Amount
from effjax.tokens.assignment import Assignment
from effjax.tokens.bipartite import cosine, match, normalised, order, without
from effjax.tokens.point import Place, Where
from effjax.tokens.tokens import Tokens
from effjax.tokens.tome import metric_of


def energy(similarity: Float[Array, "b n n"], margin: float, alpha: float) -> Float[Array, "b n"]:
    """How crowded it is around each token."""
    return jnp.mean(jax.nn.elu(similarity - margin, alpha), axis=-1)


@dataclasses.dataclass(frozen=True)
class PiToMe(Amount):
    """Merges tokens of high energy.

    Attributes:
      keep, remove, layers: see `Amount`; a layer removes at most half of its tokens.
      margin: at the first layer; it falls to 0 towards the last. 0.9 in the paper, 0.75 in its code.
      alpha: weight of what lies below the margin.
      everyone: layers whose candidates are all tokens instead of those of highest energy.
      metric: what tokens are compared by: the keys' mean over heads, or what goes into the mixer.
      proportional: whether attention counts sizes.
    """

    margin: float = 0.75
    alpha: float = 1.0
    everyone: Literal["first_half", "second_half", "none"] = "none"
    metric: Literal["keys", "features"] = "keys"
    proportional: bool = True

    place: ClassVar[Place] = "after_mixer"

    @property
    def needs(self) -> tuple[str, ...]:
        """What is read of the mixer."""
        return ("keys",) if self.metric == "keys" else ()

    def plan(self, tokens: Tokens, stats: Stats, where: Where) -> Assignment | None:
        """Pairs the tokens of highest energy."""
        n = tokens.count
        remove = self.removed(tokens, n // 2)
        if not remove:
            return None
        metric = normalised(tokens.inner(metric_of(stats, self.metric)))  # [B, n, D]
        similarity = cosine(metric, metric)  # [B, n, n]
        margin = self.margin * (1 - where.layer / where.depth)
        crowded = energy(similarity, margin, self.alpha)  # [B, n]
        fixed = tokens.fixed()
        if fixed is not None:
            crowded = jnp.where(fixed, -jnp.inf, crowded)
            similarity = without(similarity, fixed, fixed)
        ranks = order(crowded)  # [B, n]
        first_half = 2 * where.layer < where.depth
        everyone = self.everyone == ("first_half" if first_half else "second_half")
        candidates = ranks if everyone else ranks[:, : 2 * remove]
        a, b = candidates[:, ::2], candidates[:, 1::2]
        pairs = jax.vmap(lambda s, a, b: s[a][:, b])(similarity, a, b)  # [B, A, B]
        return match(pairs, a, b, remove, others=ranks[:, candidates.shape[1] :])
