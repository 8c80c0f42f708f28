import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.mixers.chunks import chunk_numbers, chunk_vectors, importance, spaced, within_budget
from effjax.mixers.dot_product import attention_weights


def random(draw, *shape):
    return jnp.asarray(draw.normal(size=shape), jnp.float32)


def causal(n):
    return jnp.tril(jnp.ones((n, n), bool))[None, None]


def test_numbers_go_up_where_a_chunk_begins():
    begins = jnp.asarray([[False, False, True, False, True, True]])
    assert chunk_numbers(begins).tolist() == [[0, 0, 1, 1, 2, 3]]


def test_vectors_are_the_root_of_the_length_times_the_mean(draw):
    x, numbers = random(draw, 2, 7, 3, 4), jnp.asarray([[0, 0, 1, 1, 1, 2, 2], [-1, -1, 0, 0, 0, 0, 1]])
    found = jax.jit(chunk_vectors, static_argnums=2)(x, numbers, 4)
    for row in range(2):
        for chunk in range(4):
            members = np.asarray(x, float)[row][np.asarray(numbers[row]) == chunk]
            expected = np.sqrt(len(members)) * members.mean(0) if len(members) else 0
            np.testing.assert_allclose(found[row, chunk], np.broadcast_to(expected, (3, 4)), atol=1e-6)


def test_the_variance_of_a_chunk_does_not_depend_on_its_length(draw):
    """Of 4096 samples each: within 5 standard errors of 1; the plain mean's is 1 / length."""
    for length in (1, 4, 16, 64):
        x = random(draw, 64, length, 8, 8)
        found = chunk_vectors(x, jnp.zeros((64, length), int), 1)
        assert abs(float(jnp.var(found)) - 1) < 5 * np.sqrt(2 / found.size)
        mean = jnp.mean(x, axis=1)
        assert abs(float(jnp.var(mean)) * length - 1) < 5 * np.sqrt(2 / found.size)


def test_a_budget_for_all_is_dense_causal_attention_bit_for_bit(draw):
    q, k = random(draw, 2, 9, 2, 4), random(draw, 2, 9, 2, 4)
    numbers = jnp.broadcast_to(jnp.arange(9) // 4, (2, 9))
    kept = within_budget(importance(q, k, numbers, numbers), causal(9), 9)
    sparse = attention_weights(q, k, mask=kept, causal=False)
    np.testing.assert_array_equal(sparse, attention_weights(q, k, mask=None, causal=True))


def test_chunks_of_one_token_are_exact_top_k_attention(draw):
    n, budget = 12, 3
    q, k = random(draw, 2, n, 2, 4), random(draw, 2, n, 2, 4)
    each = jnp.broadcast_to(jnp.arange(n), (2, n))
    kept = jax.jit(within_budget, static_argnums=2)(importance(q, k, each, each), causal(n), budget)
    products = np.einsum("bnhd,bshd->bhns", np.asarray(q, float), np.asarray(k, float))
    for query in range(n):
        best = np.argsort(-products[:, :, query, : query + 1], axis=2)[:, :, :budget]
        expected = np.zeros((2, 2, n), bool)
        np.put_along_axis(expected, best, True, axis=2)
        np.testing.assert_array_equal(kept[:, :, query], expected)


def test_equal_chunks_are_block_sparse_attention(draw):
    """A budget of whole blocks keeps whole blocks, those of the largest products of sums."""
    n, size = 16, 4
    q, k = random(draw, 1, n, 1, 4), random(draw, 1, n, 1, 4)
    numbers = jnp.broadcast_to(jnp.arange(n) // size, (1, n))
    scores = importance(q, k, numbers, numbers)
    blocks = np.einsum("cd,ed->ce", *(np.asarray(x, float).reshape(4, size, 4).sum(1) for x in (q, k))) / size
    np.testing.assert_allclose(scores[0, 0, ::size, ::size], blocks, atol=1e-5)
    kept = np.asarray(within_budget(scores, jnp.ones((1, 1, n, n), bool), 2 * size))[0, 0]
    for block in range(4):
        best = set(np.argsort(-blocks[block])[:2].tolist())
        for other in range(4):
            part = kept[block * size : (block + 1) * size, other * size : (other + 1) * size]
            assert part.all() if other in best else not part.any()


def test_chunks_that_follow_the_text_find_more_than_blocks(draw):
    """Segments of random lengths, their keys around one direction each: the mass that exact top-k has."""
    n, budget, dim = 256, 64, 32
    lengths = draw.integers(5, 28, 40)
    segment = np.repeat(np.arange(40), lengths)[:n]
    found = {"segments": [], "blocks": []}
    for _ in range(6):
        directions = draw.normal(size=(40, dim))
        keys = directions[segment] + 0.7 * draw.normal(size=(n, dim))
        queries = 1.5 * directions[draw.permutation(segment)] / np.sqrt(dim) + 0.2 * draw.normal(
            size=(n, dim)
        )
        q, k = (jnp.asarray(x[None, :, None], jnp.float32) for x in (queries, keys))
        weights = np.asarray(attention_weights(q, k, mask=None, causal=False, scale=1.0))[0, 0]
        best = np.sort(weights, axis=1)[:, -budget:].sum(1)
        each = jnp.arange(n)[None]
        for name, numbers in (("segments", segment), ("blocks", np.arange(n) // (n // (segment.max() + 1)))):
            scores = importance(q, k, each, jnp.asarray(numbers)[None])
            kept = np.asarray(within_budget(scores, jnp.ones((1, 1, n, n), bool), budget))[0, 0]
            found[name].append(((weights * kept).sum(1) / best).mean())
    gained = np.subtract(found["segments"], found["blocks"])
    assert gained.min() > 0, found
    assert gained.mean() > 0.03, found


@pytest.mark.parametrize("most", [0, 3, 100])
@pytest.mark.parametrize("apart", [0, 1, 4])
def test_spaced_takes_what_a_loop_from_best_to_worst_takes(draw, most, apart):
    scores = draw.integers(0, 12, (4, 50)).astype(np.float32)  # with ties
    scores[draw.random((4, 50)) < 0.2] = -np.inf
    found = jax.jit(spaced, static_argnums=2)(jnp.asarray(scores), jnp.full(4, most), apart)
    for row in range(4):
        taken = []
        for place in np.argsort(-scores[row], kind="stable"):
            free = all(abs(place - other) > apart for other in taken)
            if free and len(taken) < most and scores[row, place] > -np.inf:
                taken.append(place)
        assert np.flatnonzero(found[row]).tolist() == sorted(taken)
