import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.decoding.cache import EMPTY, append, init_cache, visible
from effjax.errors import UsageError


def block(first, tokens):
    """Keys and values that say which token they are."""
    numbers = (first + jnp.arange(tokens, dtype=jnp.float32))[None, :, None, None]
    keys = jnp.broadcast_to(numbers, (2, tokens, 1, 4))
    return keys, -keys


def test_tokens_go_into_the_next_slots():
    cache = init_cache(2, 5, 1, 4)
    cache = append(cache, *block(1, 3), jnp.array([[0, 1, 2], [-1, 0, 1]]))
    cache = append(cache, *block(4, 1), jnp.array([[3], [2]]))
    assert int(cache.written) == 4
    np.testing.assert_array_equal(cache.keys[0, :, 0, 0], [1, 2, 3, 4, 0])
    np.testing.assert_array_equal(cache.values[1, :, 0, 3], [-1, -2, -3, -4, 0])
    np.testing.assert_array_equal(cache.positions, [[0, 1, 2, 3, EMPTY], [-1, 0, 1, 2, EMPTY]])


def test_queries_see_what_is_held_and_not_later():
    cache = append(init_cache(2, 4, 1, 4), *block(1, 3), jnp.array([[0, 1, 2], [-1, 0, 1]]))
    queries = jnp.array([[1, 2], [-1, 1]])
    np.testing.assert_array_equal(
        visible(cache.positions, queries)[:, 0],
        [[[1, 1, 0, 0], [1, 1, 1, 0]], [[0, 0, 0, 0], [0, 1, 1, 0]]],
    )
    np.testing.assert_array_equal(
        visible(cache.positions, queries, causal=False)[:, 0, 0], [[1, 1, 1, 0], [0, 1, 1, 0]]
    )


def test_what_is_seen_follows_positions_and_not_slots():
    cache = append(init_cache(2, 3, 1, 4), *block(1, 3), jnp.array([[2, 0, 1], [0, 2, 1]]))
    np.testing.assert_array_equal(
        visible(cache.positions, jnp.array([[1], [1]]))[:, 0, 0], [[0, 1, 1], [1, 0, 1]]
    )


def test_a_cache_passes_through_transformations():
    shapes = jax.eval_shape(lambda: init_cache(2, 5, 1, 4, jnp.bfloat16))
    assert shapes.keys.dtype == jnp.bfloat16

    def write(cache, place):
        return append(cache, *block(place, 1), jnp.broadcast_to(place, (2, 1))), None

    cache, _ = jax.lax.scan(write, init_cache(2, 5, 1, 4), jnp.arange(5))
    np.testing.assert_array_equal(cache.positions[0], range(5))
    np.testing.assert_array_equal(cache.keys[0, :, 0, 0], range(5))


def test_too_many_tokens_are_refused():
    with pytest.raises(UsageError, match="3 tokens do not fit a cache of 2 slots"):
        append(init_cache(2, 2, 1, 4), *block(1, 3), jnp.zeros((2, 3), jnp.int32))
