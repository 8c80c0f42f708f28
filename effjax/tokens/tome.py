"""Token merging: at every layer the most similar pairs of tokens become one.

    A = tokens at even places, B = those at odd ones
    a in A proposes to argmax_b cos(k_a, k_b),   k the mean of the keys over the heads
    the r proposals with the largest cosines are merged:   x_b <- (s_b x_b + sum s_a x_a) / (s_b + sum s_a)

Sizes s add up, and attention adds their logarithm to the logits. It stands between attention and FFN and
needs no training. Class, distillation and register tokens take no part.

Source: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, section 3.
"""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp

from effjax.mixers.stats import Stats
from effjax.tokens.amounts import Amount, check_layers, inflected
from effjax.tokens.assignment import Assignment
from effjax.tokens.bipartite import cosine, match, normalised, without
from effjax.tokens.point import Place, Where
from effjax.tokens.tokens import Tokens


def metric_of(stats: Stats, metric: str) -> jnp.ndarray:
    """`[B, N, D]`: by what tokens are compared."""
    return jnp.mean(stats.keys, axis=2) if metric == "keys" else stats.features


@dataclasses.dataclass(frozen=True)
class ToMe(Amount):
    """Merges similar tokens.

    Attributes:
      keep, remove, layers: see `Amount`; a layer removes at most half of its tokens.
      inflection: of `remove` over depth, from -1 (falling to none) to 1 (rising from none); 0 is constant.
      metric: what tokens are compared by: the keys' mean over heads, or what goes into the mixer.
      proportional: whether attention counts sizes.
    """

    inflection: float = 0.0
    metric: Literal["keys", "features"] = "keys"
    proportional: bool = True

    place: ClassVar[Place] = "after_mixer"

    @property
    def needs(self) -> tuple[str, ...]:
        """What is read of the mixer."""
        return ("keys",) if self.metric == "keys" else ()

    def points(self, depth: int) -> dict[int, "ToMe"]:
        """The layers that reduce."""
        if self.remove is None or not self.inflection:
            return super().points(depth)
        counts = inflected(self.remove, self.inflection, depth)
        layers = tuple(range(depth)) if self.layers is None else self.layers
        check_layers(layers, depth)
        each = {layer: counts[layer] for layer in layers}
        return {
            layer: dataclasses.replace(self, remove=count, inflection=0.0)
            for layer, count in each.items()
            if count
        }

    def plan(self, tokens: Tokens, stats: Stats, where: Where) -> Assignment | None:
        """Pairs tokens at even places with tokens at odd places."""
        n, before = tokens.count, tokens.ends[0]
        remove = self.removed(tokens, n // 2)
        if not remove:
            return None
        metric = normalised(tokens.inner(metric_of(stats, self.metric)))  # [B, n, D]
        first = before % 2  # places are counted from the class token
        a, b = slice(first, None, 2), slice(1 - first, None, 2)
        similarity = cosine(metric[:, a], metric[:, b])  # [B, n/2, n/2]
        fixed = tokens.fixed()
        if fixed is not None:
            similarity = without(similarity, fixed[:, a], fixed[:, b])
        places = jnp.broadcast_to(jnp.arange(n)[None], metric.shape[:2])
        remove = min(remove, similarity.shape[1])
        return match(similarity, places[:, a], places[:, b], remove, ordered=bool(before))
