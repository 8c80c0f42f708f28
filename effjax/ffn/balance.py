"""What keeps the experts of a mixture evenly used.

    load_balance   E sum_e f_e P_e                     Fedus et al., "Switch Transformers", 2021, section 2.2
    router_z       mean_t log^2 sum_e exp(s_te)        Zoph et al., "ST-MoE", 2022
    nudged         b_e + u sign(mean_e n_e - n_e)      Wang et al. 2024, arXiv:2408.15664

s are logits, P_e the mean over tokens of the probability of expert e, f_e its share of all places that were
chosen, n_e how many. The first is 1 where both are even and draws the router there; the second keeps logits
small, where they round well. The third is no loss: b is added to the scores where experts are chosen, not
where they are weighed, and no gradient flows into it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.ffn.routing import Scores, affinities


def load_balance(
    logits: Float[Array, "t e"], index: Int[Array, "t k"], scores: Scores = "softmax"
) -> Float[Array, ""]:
    """How uneven the use of experts is: 1 where it is even, `experts` over `k` where all choose the same.

    Sigmoid scores are divided by their sum first, as DeepSeek-V3 does.
    """
    experts = logits.shape[-1]
    used = jnp.bincount(index.reshape(-1), length=experts) / index.size  # [E]
    p = affinities(logits, scores)  # [T, E]
    if scores == "sigmoid":
        p = p / jnp.sum(p, axis=-1, keepdims=True)
    return experts * jnp.sum(used * jnp.mean(p, axis=0))


def router_z(logits: Float[Array, "t e"]) -> Float[Array, ""]:
    """How far the normalisers of the router's softmax are from one, squared and in logarithms."""
    wide = jnp.promote_types(logits.dtype, jnp.float32)
    return jnp.mean(jax.nn.logsumexp(logits.astype(wide), axis=-1) ** 2)


def nudged(bias: Float[Array, " e"], index: Int[Array, "t k"], rate: float) -> Float[Array, " e"]:
    """The bias of the next step: a step up for experts with fewer tokens than the mean, down for others.

    Args:
      bias: of each expert.
      index: the experts that tokens chose.
      rate: u, the length of the step; 0.001 in the paper.
    """
    load = jnp.bincount(index.reshape(-1), length=len(bias))
    # Whole numbers: a load that is the mean gives exactly no step.
    return bias + rate * jnp.sign(index.size - len(bias) * load).astype(bias.dtype)
