"""How much of each slot new tokens take together: what policies go by that keep what is attended to most."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.decoding.policies.policy import Look
from effjax.mixers.dot_product import BLOCK, LOGITS_AT_ONCE


def look_and_sum(
    look: Look,
    keys: Float[Array, "b s groups d"],
    values: Float[Array, "b s groups e"],
    held: Int[Array, "b s *groups"],
    size: Float[Array, "b s groups"] | None,
    tokens: int,
    block: int | None = None,
) -> tuple[Float[Array, "b n h e"], Float[Array, "b s groups"]]:
    """What all new tokens take, and how much of each slot they took together.

    Of the weights only sums over queries are kept, so that queries may take turns in blocks: memory then
    grows with the slots, not with their product with the tokens.

    Args:
      look: what tokens take from slots.
      keys: of the slots.
      values: of the slots.
      held: positions of the slots.
      size: how many tokens each stands for.
      tokens: how many look.
      block: tokens that look together; None takes all of them as long as a head has no more than
        `LOGITS_AT_ONCE` weights, else `BLOCK`.
    """
    batch, slots, groups = keys.shape[:3]
    if block is None:
        block = tokens if tokens * slots <= LOGITS_AT_ONCE else BLOCK

    def some(part: tuple[Any, int] | None) -> tuple[Array, Array]:
        y, weights = look(keys, values, held, size, tell=True, part=part)
        assert weights is not None
        return y, attention_taken(weights, groups)

    if block >= tokens:
        return some(None)
    whole, rest = divmod(tokens, block)

    def step(taken: Array, first: Array) -> tuple[Array, Array]:
        y, more = some((first, block))
        return taken + more, y

    taken, y = jax.lax.scan(step, jnp.zeros((batch, slots, groups)), block * jnp.arange(whole))
    y = jnp.moveaxis(y, 0, 1).reshape(batch, whole * block, *y.shape[3:])  # [B, N, H, E]
    if not rest:
        return y, taken
    last, more = some((whole * block, rest))
    return jnp.concatenate([y, last], axis=1), taken + more


def attention_taken(weights: Float[Array, "b h n s"], groups: int) -> Float[Array, "b s groups"]:
    """How much of each slot all queries of a group's heads took together."""
    b, h, n, s = weights.shape
    return jnp.sum(weights.reshape(b, groups, h // groups * n, s), axis=2).swapaxes(1, 2)
