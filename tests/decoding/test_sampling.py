import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.decoding.sampling import Sampling, in_rows, min_p, sample, sample_rows, top_k, top_p
from effjax.errors import UsageError

# Probabilities 0.1, 0.4, 0.05, 0.3, 0.15.
LOGITS = jnp.log(jnp.array([0.1, 0.4, 0.05, 0.3, 0.15]))


def kept(logits):
    return [int(i) for i in np.flatnonzero(np.isfinite(logits))]


@pytest.mark.parametrize(
    ("k", "tokens"), [(1, [1]), (2, [1, 3]), (3, [1, 3, 4]), (5, [*range(5)]), (9, [*range(5)])]
)
def test_top_k_keeps_the_k_largest(k, tokens):
    filtered = top_k(LOGITS, k)
    assert kept(filtered) == tokens
    np.testing.assert_array_equal(filtered[np.array(tokens)], LOGITS[np.array(tokens)])


@pytest.mark.parametrize(
    ("p", "tokens"),
    [
        (1e-9, [1]),  # at least one, however small p is
        (0.39, [1]),
        (0.41, [1, 3]),  # 0.4 does not reach it
        (0.69, [1, 3]),
        (0.71, [1, 3, 4]),
        (0.94, [0, 1, 3, 4]),
        (0.96, [0, 1, 2, 3, 4]),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(p, tokens):
    filtered = top_p(LOGITS, p)
    assert kept(filtered) == tokens
    np.testing.assert_array_equal(filtered[np.array(tokens)], LOGITS[np.array(tokens)])


@pytest.mark.parametrize(
    ("share", "tokens"), [(1.0, [1]), (0.74, [1, 3]), (0.76, [1]), (0.2, [0, 1, 3, 4]), (1e-9, [*range(5)])]
)
def test_min_p_keeps_the_tokens_near_the_likeliest(share, tokens):
    filtered = min_p(LOGITS, share)
    assert kept(filtered) == tokens
    np.testing.assert_array_equal(filtered[np.array(tokens)], LOGITS[np.array(tokens)])
    np.testing.assert_array_equal(kept(min_p(LOGITS + 7.0, share)), tokens)  # only ratios count


def test_ties_go_to_the_smaller_number():
    assert kept(top_k(jnp.zeros(6), 2)) == [0, 1]
    assert kept(top_p(jnp.zeros(4), 0.6)) == [0, 1, 2]


def test_filters_work_row_by_row():
    rows = jnp.stack([LOGITS, LOGITS[::-1]])
    for name, argument in ((top_k, 2), (top_p, 0.6), (min_p, 0.3)):
        np.testing.assert_array_equal(name(rows, argument), jnp.stack([name(row, argument) for row in rows]))


def frequencies(sampling, draws=4000):
    keys = jax.random.split(jax.random.key(0), draws)
    tokens = jax.jit(jax.vmap(lambda key: sample(LOGITS, key, sampling)))(keys)
    return np.bincount(tokens, minlength=5) / draws


def test_draws_follow_the_distribution():
    probabilities = np.exp(LOGITS)
    np.testing.assert_allclose(frequencies(Sampling()), probabilities, atol=0.03)
    sharper = probabilities**2 / np.sum(probabilities**2)
    np.testing.assert_allclose(frequencies(Sampling(temperature=0.5)), sharper, atol=0.03)
    np.testing.assert_allclose(frequencies(Sampling(top_k=2)), [0, 4 / 7, 0, 3 / 7, 0], atol=0.03)
    np.testing.assert_allclose(frequencies(Sampling(top_p=0.6)), [0, 4 / 7, 0, 3 / 7, 0], atol=0.03)
    np.testing.assert_allclose(frequencies(Sampling(min_p=0.7)), [0, 4 / 7, 0, 3 / 7, 0], atol=0.03)


def test_top_p_counts_mass_after_temperature_and_top_k():
    # Top-3 leaves 0.4, 0.3, 0.15 of 0.85: the first two hold 0.82 of it, and 0.7 of the whole.
    assert np.flatnonzero(frequencies(Sampling(top_k=3, top_p=0.8))).tolist() == [1, 3]
    assert np.flatnonzero(frequencies(Sampling(top_p=0.8))).tolist() == [1, 3, 4]
    # At temperature 1/2 the first token holds 0.58.
    assert np.flatnonzero(frequencies(Sampling(temperature=0.5, top_p=0.5))).tolist() == [1]


def test_min_p_counts_the_share_after_temperature():
    assert np.flatnonzero(frequencies(Sampling(min_p=0.35))).tolist() == [1, 3, 4]
    # At temperature 1/2 the third is down to 0.14 of the first.
    assert np.flatnonzero(frequencies(Sampling(temperature=0.5, min_p=0.35))).tolist() == [1, 3]


def test_temperature_zero_is_greedy():
    assert frequencies(Sampling(temperature=0.0), draws=8).tolist() == [0, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"min_p": 2.0}, "min_p is 2.0"),
    ],
)
def test_bad_requests_are_named(fields, message):
    with pytest.raises(UsageError, match=message):
        Sampling(**fields)


WAYS = (
    Sampling(temperature=0.0, top_k=3, min_p=0.5),
    Sampling(),
    Sampling(temperature=0.7, top_k=4, top_p=0.8, min_p=0.05),
    Sampling(temperature=1.7, top_p=0.6),
    Sampling(temperature=1.3, min_p=0.2),
    Sampling(temperature=2.0, top_k=1),
    Sampling(temperature=1.0, top_k=99),
)


@pytest.mark.parametrize("ways", [WAYS, WAYS[:2]], ids=["all", "nothing_to_sort"])
def test_rows_that_are_told_draw_what_each_draws_alone(draw, ways):
    logits = jnp.asarray(draw.normal(size=(40, len(ways), 23)) * 3, jnp.float32)
    keys = jax.random.split(jax.random.key(1), logits.shape[:2])
    drawn = jax.jit(jax.vmap(sample_rows, (0, 0, None)))(logits, keys, in_rows(ways))
    for row, how in enumerate(ways):
        alone = jax.jit(jax.vmap(lambda logits, key: sample(logits, key, how)))  # noqa: B023
        np.testing.assert_array_equal(drawn[:, row], alone(logits[:, row], keys[:, row]))
