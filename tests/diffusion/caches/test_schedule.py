"""The scheduler against all schedules there are, and what the union adds."""

import itertools

import numpy as np
import pytest

from effjax.diffusion.caches.schedule import best_updates, bubbled, similarity, volatility
from effjax.errors import UsageError


def worth(alike, chosen):
    """What a schedule is worth, call by call."""
    return sum(alike[max(u for u in chosen if u <= n), n] for n in range(len(alike)))


@pytest.mark.parametrize("updates", [1, 2, 3, 5, 8])
def test_nothing_is_better_of_all_there_is(updates, draw):
    outputs = draw.normal(size=(8, 20)).cumsum(axis=0)
    alike = similarity(outputs)
    chosen = best_updates(alike, updates)
    every = [(0, *rest) for rest in itertools.combinations(range(1, 8), updates - 1)]
    assert tuple(chosen) in every
    assert worth(alike, chosen) == pytest.approx(max(worth(alike, other) for other in every), rel=1e-12)


def test_distances_may_be_negative():
    """Also where nothing is alike, the first call and as many as are asked for are computed."""
    alike = -np.abs(np.arange(6)[:, None] - np.arange(6)[None]).astype(float)
    chosen = best_updates(alike, 3)
    assert len(chosen) == 3
    assert worth(alike, chosen) == max(
        worth(alike, (0, a, b)) for a, b in itertools.combinations(range(1, 6), 2)
    )


def test_a_jump_is_where_an_update_is():
    outputs = np.repeat(np.eye(3), [4, 5, 3], axis=0)  # three plateaus
    assert best_updates(similarity(outputs), 3) == [0, 4, 9]


def test_similarity_is_the_cosine():
    a = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, -2.0]])
    root = np.sqrt(0.5)
    np.testing.assert_allclose(similarity(a), [[1, root, 0], [root, 1, -root], [0, -root, 1]], atol=1e-12)
    assert np.all(np.isfinite(similarity(np.zeros((2, 3)))))


def test_volatility_is_the_mean_difference_of_all_pairs(draw):
    outputs = draw.normal(size=(5, 2, 3))
    pairs = [np.mean(np.abs(outputs[i] - outputs[j])) for i in range(5) for j in range(i + 1, 5)]
    assert volatility(outputs) == pytest.approx(np.mean(pairs))


def test_the_union_adds_the_updates_of_feed_forward_branches_behind():
    """Three layers of attention and feed-forward, the second layer's attention being the most volatile."""
    fresh = np.zeros((6, 3, 2), bool)
    fresh[0] = True
    fresh[1, 0, 1] = True  # before it: does not count
    fresh[2, 1, 1] = True  # of its own layer
    fresh[3, 2, 1] = True  # behind
    fresh[4, 2, 0] = True  # attention: does not count
    volatile = np.array([[0.3, 0.1], [0.9, 0.2], [0.5, 0.4]])
    got = bubbled(fresh, volatile, 1)
    assert np.flatnonzero(got[:, 1, 0]).tolist() == [0, 2, 3]
    others = np.ones((3, 2), bool)
    others[1, 0] = False
    np.testing.assert_array_equal(got[:, others], fresh[:, others])
    np.testing.assert_array_equal(bubbled(fresh, volatile, 0), fresh)


def test_the_union_never_takes_an_update_away(draw):
    fresh = draw.random((9, 4, 2)) < 0.3
    for union in range(9):
        assert np.all(bubbled(fresh, draw.random((4, 2)), union) >= fresh)


def test_refusals():
    with pytest.raises(UsageError, match="updates=9 must lie between 1 and the 8 calls"):
        best_updates(np.eye(8), 9)
    with pytest.raises(UsageError, match="union=5 must lie between 0 and the 4 branches"):
        bubbled(np.ones((3, 2, 2), bool), np.ones((2, 2)), 5)
