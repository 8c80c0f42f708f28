"""Chunks of unequal length: which tokens stand together, what a chunk looks like, which keys it lets through.

    q_c = sum_{i in c} q_i / sqrt|c|,   k_c likewise                  sqrt|c| times the mean
    S[c, c'] = q_c k_c',   importance[i, j] = S[chunk(i), chunk(j)]
    kept_i: the `budget` keys j of largest importance that i may see

A mean over |c| independent tokens has a variance of 1/|c|, so that long chunks would never be chosen; with
the root all chunks are alike. These are the plain forms, over all pairs; what reads only the keys that are
kept is `effjax.decoding.policies.dhsa`.

Xiong, Zou, Fekri and Cho, "Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device
LLMs", arXiv:2510.24606, sections 3.1 to 3.3.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def chunk_numbers(begins: Bool[Array, "b n"]) -> Int[Array, "b n"]:
    """The chunk of each token, counted from 0; the first token begins one in any case."""
    return jnp.cumsum(begins.at[:, 0].set(True).astype(jnp.int32), axis=1) - 1


def chunk_vectors(
    x: Float[Array, "b n h d"], numbers: Int[Array, "b n"], chunks: int
) -> Float[Array, "b chunks h d"]:
    """The sum of each chunk's tokens over the root of their number, in float32; 0 where a chunk is empty.

    Args:
      x: queries or keys.
      numbers: the chunk of each token; those outside of 0 to `chunks - 1` are left out.
      chunks: how many there may be.
    """
    numbers = jnp.where(numbers < 0, chunks, numbers)
    rows = jnp.arange(x.shape[0])[:, None]
    sums = jnp.zeros((x.shape[0], chunks, *x.shape[2:]), jnp.float32)
    sums = sums.at[rows, numbers].add(x.astype(jnp.float32), mode="drop")  # [B, C, H, D]
    count = jnp.zeros((x.shape[0], chunks), jnp.float32).at[rows, numbers].add(1.0, mode="drop")  # [B, C]
    return sums * jax.lax.rsqrt(jnp.maximum(count, 1.0))[:, :, None, None]


def importance(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b s h d"],
    query_chunks: Int[Array, "b n"],
    key_chunks: Int[Array, "b s"],
) -> Float[Array, "b h n s"]:
    """Scores of the chunks, for each pair of their tokens."""
    queries = chunk_vectors(q, query_chunks, q.shape[1])  # [B, C, H, D]
    keys = chunk_vectors(k, key_chunks, k.shape[1])  # [B, C', H, D]
    scores = jnp.einsum("bchd,bkhd->bhck", queries, keys)  # [B, H, C, C']
    rows = jnp.take_along_axis(scores, query_chunks[:, None, :, None], axis=2)  # [B, H, N, C']
    return jnp.take_along_axis(rows, key_chunks[:, None, None, :], axis=3)  # [B, H, N, S]


def within_budget(
    worth: Float[Array, "b h n s"], allowed: Bool[Array, "#b #h n s"], budget: int
) -> Bool[Array, "b h n s"]:
    """For each query the `budget` keys of largest worth that it may see; of equal ones the first."""
    allowed = jnp.broadcast_to(allowed, worth.shape)
    if budget >= worth.shape[3]:
        return allowed
    order = jnp.argsort(jnp.where(allowed, -worth, jnp.inf), axis=3, stable=True)  # [B, H, N, S]
    return allowed & (jnp.argsort(order, axis=3) < budget)


def spaced(scores: Float[Array, "b n"], most: Int[Array, " b"], apart: int) -> Bool[Array, "b n"]:
    """The places of largest score, none within `apart` of a better one that is taken itself.

    It takes what a loop from best to worst would take; a round of this takes all places that are the best
    around them, and most rows need few rounds.

    Args:
      scores: -inf where nothing can be taken; of equal ones the first counts more.
      most: how many places of each row.
      apart: non-maximum suppression's half width; 0 suppresses nothing.
    """
    n = scores.shape[1]
    rank = jnp.argsort(jnp.argsort(-scores, axis=1, stable=True), axis=1)  # [B, N]
    last = jnp.iinfo(rank.dtype).max

    def best_around(ranks: Array) -> Array:
        return jax.lax.reduce_window(ranks, last, jax.lax.min, (1, 2 * apart + 1), (1, 1), "SAME")

    def round_(state: tuple[Array, Array]) -> tuple[Array, Array]:
        taken, free = state
        best = best_around(jnp.where(free, rank, last))
        taken = taken | (free & (rank == best))
        near = best_around(jnp.where(taken, 0, last)) == 0
        return taken, free & ~near

    free = scores > -jnp.inf
    start = jnp.zeros_like(free), free
    taken, _ = jax.lax.while_loop(lambda state: jnp.any(state[1]), round_, start) if apart else (free, free)
    ranks = jnp.sort(jnp.where(taken, rank, last), axis=1)  # [B, N]
    worst = jnp.take_along_axis(ranks, jnp.clip(most - 1, 0, n - 1)[:, None], axis=1)  # [B, 1]
    return taken & (rank <= worst) & (most > 0)[:, None]
