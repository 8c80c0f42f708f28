"""Which token goes to which expert, as rows that `effjax.layers.grouped_product` multiplies by expert.

    token choice     every token is sent to the `chosen` experts with the largest scores
    expert choice    every expert takes the `C` tokens with the largest scores      Zhou et al. 2022

A capacity bounds what an expert of token choice takes, C = ceil(chosen f T / E) of T tokens at factor f.
First choices are served before second ones, and within these tokens in order: of their place, or of their
best score (`priority`, batch-prioritised routing, Riquelme et al. 2021). Who comes to a full
expert is dropped: it has no row, and nothing is computed for it.

    GShard, Lepikhin et al. 2020:   D[t, e, c] = 1 where token t has place c of expert e, c < C
                                    rows = einsum("tec,td->ecd", D, x),   y = einsum("tec,ecd->td", g D, rows)

That is O(T E C d). Here, as in Tutel (Hwang et al. 2022), rows are gathered and added back by
index, O(T k d), and places that no token takes do not exist: with a bound f costs what it is used of. Of
Tutel's policies 0, the least capacity that drops nothing, is no bound at all, and -f, that but at most f, is
f. `needed` tells what the first would be.
"""

import math
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.errors import UsageError

Scores = Literal["softmax", "sigmoid"]


@flax.struct.dataclass
class Routes:
    """Rows for the experts, those of one expert next to each other, in the order in which they were served.

    The fields are annotated `Any` because the same class also carries their shapes, and layers in front.

    Attributes:
      token: `[M]`, which token each row is; the number of tokens where the row is empty, as the last may be.
      weight: `[M]`, what its expert's output is multiplied with; 0 where it is empty.
      sizes: `[E]`, rows of each expert.
    """

    token: Any
    weight: Any
    sizes: Any

    @property
    def expert(self) -> Int[Array, " m"]:
        """`[M]`, which expert each row is of; the number of experts where it is empty."""
        return runs(self.sizes, len(self.token))


def runs(sizes: Int[Array, " e"], rows: int) -> Int[Array, " m"]:
    """The run that each of so many rows lies in; the number of runs behind the last."""
    return jnp.sum(jnp.arange(rows)[:, None] >= jnp.cumsum(sizes)[None], axis=1)


def affinities(logits: Float[Array, "t e"], scores: Scores) -> Float[Array, "t e"]:
    """The score of each expert for each token, in float32 at least."""
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return jax.nn.softmax(wide, axis=-1) if scores == "softmax" else jax.nn.sigmoid(wide)


def choose(
    logits: Float[Array, "t e"],
    chosen: int,
    normalised: bool,
    scores: Scores = "softmax",
    bias: Float[Array, " e"] | None = None,
) -> tuple[Float[Array, "t k"], Int[Array, "t k"]]:
    """Returns the weights of each token's experts, in float32, and which they are, best first.

    Args:
      logits: of the router.
      chosen: experts a token.
      normalised: whether the weights of a token add up to one.
      scores: how logits become scores.
      bias: added to the scores for the choice alone; weights do not know it.
    """
    p = affinities(logits, scores)
    if bias is None:
        weights, index = jax.lax.top_k(p, chosen)
    else:
        _, index = jax.lax.top_k(p + bias[None].astype(p.dtype), chosen)
        weights = jnp.take_along_axis(p, index, axis=-1)
    if normalised:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return weights, index


def capacity(factor: float, tokens: int, chosen: int, experts: int) -> int:
    """C, the tokens that an expert takes at most.

    Args:
      factor: 1 is just enough where all experts are used alike.
      tokens: how many are routed.
      chosen: experts a token.
      experts: how many there are.

    Raises:
      UsageError: where that is no token at all.
    """
    if not factor > 0:
        raise UsageError(
            f"capacity={factor:g} drops every token: give a factor above 0 (1.25 is usual), or None, which "
            f"drops none."
        )
    return min(tokens, math.ceil(chosen * factor * tokens / experts))


def needed(index: Int[Array, "t k"], experts: int) -> Float[Array, ""]:
    """The least capacity factor that would have dropped nothing."""
    load = jnp.bincount(index.reshape(-1), length=experts)
    return jnp.max(load) * experts / index.size


def by_tokens(
    weights: Float[Array, "t k"],
    index: Int[Array, "t k"],
    experts: int,
    limit: int | None = None,
    priority: Float[Array, " t"] | None = None,
) -> Routes:
    """Token choice.

    Args:
      weights: of each token's experts.
      index: which they are, best first.
      experts: how many there are.
      limit: tokens that an expert takes at most; None takes all.
      priority: tokens with more are served first; None serves them in order.
    """
    count, chosen = index.shape
    place = _served(count, chosen, priority)  # [K T]
    expert = jnp.take(index.reshape(-1), place)
    order = jnp.take(place, jnp.argsort(expert, stable=True))  # [K T], expert after expert
    sizes = jnp.bincount(expert, length=experts)  # [E]
    if limit is None or limit >= count:
        return Routes(order // chosen, jnp.take(weights.reshape(-1), order), sizes)
    kept = jnp.minimum(sizes, limit)
    rows = min(count * chosen, experts * limit)
    of = runs(kept, rows)  # [M], the expert of each row
    dropped = jnp.cumsum(sizes - kept) - (sizes - kept)  # [E], from the experts before
    source = jnp.take(order, jnp.arange(rows) + jnp.take(dropped, of, mode="clip"), mode="clip")  # [M]
    full = of < experts
    token = jnp.where(full, source // chosen, count)
    return Routes(token, jnp.where(full, jnp.take(weights.reshape(-1), source), 0), kept)


def ranks(
    index: Int[Array, "t k"], experts: int, priority: Float[Array, " t"] | None = None
) -> Int[Array, "t k"]:
    """How many are served before each token at each of its experts.

    Args:
      index: of each token's experts, best first; `experts` for none.
      experts: how many there are.
      priority: as in `by_tokens`.
    """
    count, chosen = index.shape
    place = _served(count, chosen, priority)  # [K T]
    expert = jnp.take(index.reshape(-1), place)
    order = jnp.argsort(expert, stable=True)  # [K T], expert after expert
    sizes = jnp.bincount(expert, length=experts + 1)  # [E + 1]
    before = jnp.arange(index.size) - jnp.take(jnp.cumsum(sizes) - sizes, jnp.take(expert, order))  # [K T]
    return jnp.zeros_like(expert).at[jnp.take(place, order)].set(before).reshape(index.shape)


def _served(count: int, chosen: int, priority: Float[Array, " t"] | None) -> Int[Array, " kt"]:
    """Numbers of tokens and choices in the order in which they are served: first choices first."""
    tokens = jnp.arange(count) if priority is None else jnp.argsort(-priority, stable=True)  # [T]
    return (tokens[None] * chosen + jnp.arange(chosen)[:, None]).reshape(-1)


def by_experts(p: Float[Array, "t e"], limit: int, normalised: bool) -> Routes:
    """Expert choice: a token may be taken by any number of experts, also by none.

    Args:
      p: score of each expert for each token.
      limit: tokens that an expert takes.
      normalised: whether the weights of a token add up to one.
    """
    weights, token = jax.lax.top_k(p.T, limit)  # [E, C]
    weights, token = weights.reshape(-1), token.reshape(-1)  # [E C]
    if normalised:
        total = jnp.zeros((len(p),), weights.dtype).at[token].add(weights)
        weights = weights / jnp.take(total, token)
    return Routes(token, weights, jnp.full((p.shape[1],), limit, token.dtype))


def spread(tokens: Float[Array, "t c"], routes: Routes) -> Float[Array, "m c"]:
    """The rows of the experts; empty ones are zero."""
    return jnp.take(tokens, routes.token, axis=0, mode="fill", fill_value=0)


def collected(rows: Float[Array, "m c"], routes: Routes, count: int) -> Float[Array, "t c"]:
    """What the experts say of each of `count` tokens, weighed and added up."""
    rows = rows * routes.weight[:, None].astype(rows.dtype)
    return jnp.zeros((count, rows.shape[1]), rows.dtype).at[routes.token].add(rows, mode="drop")
