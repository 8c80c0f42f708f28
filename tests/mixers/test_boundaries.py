import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import meta

from effjax.errors import UsageError
from effjax.mixers.boundaries import (
    BoundaryPredictor,
    Even,
    Learned,
    Similarity,
    attention_ratio,
    focal_loss,
    windows,
)
from effjax.mixers.chunks import chunk_numbers

N = 48
TOLD = ((jnp.arange(N) >= 4) & (jnp.arange(N) <= N - 4))[None]


def segments(key, texts):
    """Keys of texts whose segments point into a direction each, and where those begin."""
    cuts, ways, noise = jax.random.split(key, 3)
    places = jnp.cumsum(jax.random.randint(cuts, (texts, 6), 9, 16), axis=1)
    begins = jnp.any(jnp.arange(N)[None, None] == places[:, :, None], axis=1) & TOLD
    ways = jax.random.normal(ways, (texts, 8, 2, 4))
    keys = jnp.take_along_axis(ways, chunk_numbers(begins)[:, :, None, None], axis=1)
    return keys + 0.2 * jax.random.normal(noise, keys.shape), begins


def test_windows_hold_the_keys_on_both_sides(draw):
    keys = jnp.asarray(draw.normal(size=(1, 5, 1, 3)), jnp.float32)
    sides = windows(keys, 2)
    np.testing.assert_array_equal(sides[0, 2], keys[0, 0:4, 0])
    np.testing.assert_array_equal(sides[0, 0, :2], np.zeros((2, 3)))
    np.testing.assert_array_equal(sides[0, 4, 2], keys[0, 4, 0])


def test_even_chunks_are_counted_without_padding():
    valid = jnp.asarray([[False, False, True, True, True, True, True]])
    begins = Even().begins(jnp.zeros((1, 7, 1, 2)), valid, 2)
    assert np.flatnonzero(begins[0]).tolist() == [2, 4, 6]


def test_keys_that_turn_begin_a_chunk():
    keys, begins = segments(jax.random.key(0), 4)
    found = jax.jit(Similarity().begins, static_argnums=2)(keys, jnp.ones((4, N), bool), 8)
    assert (found >= begins).all()  # all cuts, and weaker turns to fill the number
    assert found.sum(1).max() <= N // 8 - 1


def test_padding_begins_nothing(draw):
    keys = jnp.asarray(draw.normal(size=(1, N, 2, 4)), jnp.float32)
    valid = (jnp.arange(N) >= 20)[None]
    found = Similarity(apart=0).begins(keys, valid, 1)
    assert np.flatnonzero(found[0]).tolist() == list(range(24, N - 3))
    loud = keys.at[:, :20].set(1e3)
    np.testing.assert_array_equal(Similarity(apart=0).begins(loud, valid, 1), found)


def test_the_ratio_is_that_of_later_attention(draw):
    n, w = 14, 2
    weights = np.tril(draw.random((2, 3, n, n))) ** 3
    found = jax.jit(attention_ratio, static_argnums=1)(jnp.asarray(weights, jnp.float32), w)
    mean = weights.mean(1)
    for row in range(2):
        for at in range(n):
            left, right = (mean[row, at + w :, s : s + w].sum() for s in (at - w, at)) if at >= w else (0, 0)
            expected = (max(left, right) + 1e-6) / (min(left, right) + 1e-6)
            if not 2 * w <= at <= n - 2 * w:
                expected = 0.0
            np.testing.assert_allclose(found[row, at], expected, rtol=1e-4)


def test_focal_loss_is_cross_entropy_where_it_does_not_focus(draw):
    logits, targets = jnp.asarray(draw.normal(size=20) * 3, jnp.float32), jnp.asarray(draw.random(20) < 0.5)
    plain = optax.sigmoid_binary_cross_entropy(logits, targets.astype(jnp.float32))
    np.testing.assert_allclose(focal_loss(logits, targets, focus=0.0, positive=1.0), plain, rtol=1e-5)
    p = np.where(targets, jax.nn.sigmoid(logits), 1 - jax.nn.sigmoid(logits))
    expected = (1 - p) ** 2 * plain * np.where(targets, 1.3, 1.0)
    np.testing.assert_allclose(focal_loss(logits, targets), expected, rtol=1e-5, atol=1e-7)


def test_a_predictor_learns_where_segments_begin():
    predictor = BoundaryPredictor(heads=2, hidden=32)
    params = meta.unbox(predictor.init(jax.random.key(0), jnp.zeros((1, N, 2, 4)))["params"])
    optimizer = optax.adam(1e-2)

    @jax.jit
    def train(params):
        def step(state, key):
            keys, targets = segments(key, 16)

            def loss(params):
                logits = predictor.apply({"params": params}, keys)
                return jnp.mean(jnp.where(TOLD, focal_loss(logits, targets), 0.0))

            params, held = state
            changes, held = optimizer.update(jax.grad(loss)(params), held)
            return (optax.apply_updates(params, changes), held), None

        start = params, optimizer.init(params)
        return jax.lax.scan(step, start, jax.random.split(jax.random.key(1), 400))[0][0]

    learned = Learned(predictor, train(params), least=0.0)
    keys, begins = segments(jax.random.key(5), 32)
    found = learned.begins(keys, jnp.ones((32, N), bool), 8)
    assert (found & begins).sum() > 0.9 * begins.sum()
    assert (found & begins).sum() > 0.9 * found.sum()
    assert hash(learned) != hash(Learned(predictor, learned.params))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Similarity(window=0), "window=0 must be at least 1"),
        (lambda: Similarity(apart=-1), "apart=-1 at least 0"),
        (
            lambda: BoundaryPredictor(heads=3).init(jax.random.key(0), jnp.zeros((1, 9, 2, 4))),
            "heads=3 does not divide the 8 channels",
        ),
    ],
)
def test_bad_input(make, said):
    with pytest.raises(UsageError, match=said):
        make()
