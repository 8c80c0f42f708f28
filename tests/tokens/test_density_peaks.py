"""Density peaks: the published equations, one token a crowd."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from effjax.errors import UsageError
from effjax.tokens.density_peaks import density_peaks, peak_scores


def reference(x, neighbours):
    """Scores of one example, token by token; the nearest are scikit-learn's.

    Of two that are each other's nearest, which are equally dense, the earlier is the denser.
    """
    x = np.asarray(x, np.float64)
    near, _ = NearestNeighbors(n_neighbors=neighbours).fit(x).kneighbors(x)
    density = np.exp(-(near**2 / x.shape[1]).mean(1)).round(12)
    distances = np.linalg.norm(x[:, None] - x[None], axis=-1) / np.sqrt(x.shape[1])
    scores = []
    for i in range(len(x)):
        denser = [d for j, d in enumerate(distances[i]) if (density[j], -j) > (density[i], -i)]
        scores.append(density[i] * min(denser, default=distances.max()))
    return np.array(scores)


@pytest.mark.parametrize("neighbours", [1, 2, 5])
def test_scores_are_their_equations(neighbours):
    x = jax.random.normal(jax.random.key(0), (2, 17, 6)) + 30.0  # far from the origin, where products cancel
    expected = np.stack([reference(row, neighbours) for row in x])
    np.testing.assert_allclose(peak_scores(x, neighbours), expected, rtol=1e-4)
    kept = density_peaks(x, 6, neighbours)
    np.testing.assert_array_equal(kept, np.sort(np.argsort(-expected, axis=1)[:, :6], axis=1))


def test_every_planted_crowd_keeps_one_token():
    rng = np.random.default_rng(1)
    crowd = rng.permutation(np.repeat(np.arange(7), [1, 2, 3, 5, 8, 9, 12]))
    x = 3 * rng.standard_normal((7, 8))[crowd] + 0.01 * rng.standard_normal((40, 8))
    kept = np.asarray(density_peaks(jnp.asarray(x[None], jnp.float32), 7, 2))[0]
    assert sorted(crowd[kept]) == list(range(7))
    assert (np.diff(kept) > 0).all()


def test_the_order_of_tokens_makes_no_difference_where_no_two_are_equal():
    x = jax.random.normal(jax.random.key(2), (1, 20, 4))
    order = jax.random.permutation(jax.random.key(3), 20)
    kept, moved = density_peaks(x, 8, 3)[0], density_peaks(x[:, order], 8, 3)[0]
    np.testing.assert_array_equal(np.sort(order[moved]), kept)


def test_equal_tokens_are_chosen_from_the_front_and_pass_no_gradient():
    x = jnp.ones((1, 6, 3))
    np.testing.assert_array_equal(density_peaks(x, 2, 2)[0], [0, 1])
    assert (
        float(jnp.abs(jax.grad(lambda x: peak_scores(x, 2).sum())(x + jnp.arange(3.0)[None, None])).max())
        == 0
    )


@pytest.mark.parametrize(
    ("keep", "neighbours", "message"), [(0, 2, "keep=0"), (7, 2, "keep=7"), (3, 7, "neighbours=7")]
)
def test_more_than_there_is_is_refused(keep, neighbours, message):
    with pytest.raises(UsageError, match=message):
        density_peaks(jnp.ones((1, 6, 3)), keep, neighbours)
