"""Pairs of similar tokens: every token of one set looks for the nearest of another."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from effjax.tokens.assignment import Assignment
from effjax.tokens.tokens import rows


def normalised(metric: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    """Rows of length one, without a gradient: where tokens go is no function to train."""
    metric = jax.lax.stop_gradient(metric).astype(jnp.float32)
    return metric * jax.lax.rsqrt(jnp.sum(metric**2, axis=-1, keepdims=True))


def cosine(a: Float[Array, "b n d"], b: Float[Array, "b m d"]) -> Float[Array, "b n m"]:
    """Products of every row of the one with every row of the other."""
    return jax.lax.dot_general(a, b, (((2,), (2,)), ((0,), (0,))))


def without(
    similarity: Float[Array, "b a s"], rows: Bool[Array, "b a"], columns: Bool[Array, "b s"]
) -> Float[Array, "b a s"]:
    """The similarity, below every other one where a row or a column must not be chosen."""
    return jnp.where(rows[:, :, None] | columns[:, None, :], -jnp.inf, similarity)


def order(scores: Float[Array, "b n"]) -> Int[Array, "b n"]:
    """Places by falling score; of equal ones the first comes first."""
    return jnp.argsort(-scores, axis=-1, stable=True)


def match(
    similarity: Float[Array, "b a s"],
    sources: Int[Array, "b a"],
    targets: Int[Array, "b s"],
    remove: int,
    others: Int[Array, "b p"] | None = None,
    ordered: bool = False,
) -> Assignment:
    """Merges the `remove` sources that are most like a target into it.

    The new order is: `others`, the sources that stay, the targets.

    Args:
      similarity: of each source to each target.
      sources: their places.
      targets: their places.
      remove: how many sources go, at most all.
      others: tokens that stay and take no part.
      ordered: whether sources that stay keep their order; otherwise they fall by similarity.
    """
    nearest = jnp.argmax(similarity, axis=-1)  # [B, A], a place among the targets
    if remove == sources.shape[1]:
        gone, stay = sources, sources[:, :0]
        into = nearest
    else:
        ranks = order(jnp.max(similarity, axis=-1))  # [B, A]
        picked, left = ranks[:, :remove], ranks[:, remove:]
        left = jnp.sort(left, axis=-1) if ordered else left
        gone, stay = rows(sources, picked), rows(sources, left)
        into = rows(nearest, picked)  # [B, R]
    others = sources[:, :0] if others is None else others
    before = others.shape[1] + stay.shape[1]
    return Assignment(jnp.concatenate([others, stay, targets], axis=1), gone, into + before)
