"""Token pruning for state-space models: what is left out still lets the state decay.

    score_n = mean_d max(0, y_nd),   y the output of the scan, gated
    keep the tokens of largest score, in their order
    h_i = exp(A (dt_i + g_i dt_0)) h_{i-1} + dt_i B_i u_i

g_i tokens are missing before token i in the direction of the scan, and dt_0 = softplus(b_dt) is the step of a
token without content. Without the alignment (g = 0) neighbours in the scan are no neighbours in the picture
any more. All directions keep the same tokens. A class token stays in its place among those that are kept.

The published code prunes Vim-S behind blocks 5, 10 and 15 (of 24), Vim-T behind 10 and 20; it scores by the
backward direction alone, and moves the class token to the middle of what is left. How steps of missing tokens
are found in later layers is not in it: dt_0 is our reading.

Source: Zhan et al., "Exploring Token Pruning in Vision State Space Models", NeurIPS 2024, arXiv:2409.18962.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.mixers.stats import Stats
from effjax.tokens.amounts import Amount
from effjax.tokens.assignment import Assignment
from effjax.tokens.point import Place, Where
from effjax.tokens.pruning import keep_best
from effjax.tokens.tokens import Tokens


def importance(output: Float[Array, "b n i"]) -> Float[Array, "b n"]:
    """The mean over channels of what is above zero."""
    return jnp.mean(jnp.maximum(output.astype(jnp.float32), 0.0), axis=-1)


@dataclasses.dataclass(frozen=True)
class ToPViM(Amount):
    """Leaves out the tokens of which a scan makes least.

    Attributes:
      keep, remove, layers: see `Amount`.
    """

    needs: ClassVar[tuple[str, ...]] = ("output",)
    place: ClassVar[Place] = "after_mixer"
    proportional: ClassVar[bool] = False

    def plan(self, tokens: Tokens, stats: Stats, where: Where) -> Assignment | None:
        """Ranks tokens by their outputs."""
        remove = self.removed(tokens)
        if not remove:
            return None
        scores = importance(jax.lax.stop_gradient(stats.output))  # [B, N]
        return keep_best(tokens.inner(scores), remove, tokens)
