import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.mixers import windows


@pytest.mark.parametrize(("grid", "window"), [((4, 6), (2, 3)), ((6, 6), (6, 6)), ((3, 8), (1, 4))])
def test_partition_cuts_rows_of_windows_and_reverse_lays_them_out(grid, window):
    x = np.arange(2 * grid[0] * grid[1] * 3).reshape(2, *grid, 3)
    cut = windows.partition(x, window)
    (m, n), across = window, grid[1] // window[1]
    for b, i, j in np.ndindex(2, *grid):
        place = cut[b, (i // m) * across + j // n, (i % m) * n + j % n]
        np.testing.assert_array_equal(place, x[b, i, j])
    np.testing.assert_array_equal(windows.reverse(jnp.asarray(cut, jnp.float32), grid, window), x)


def test_a_window_is_not_larger_than_its_map_and_does_not_shift_where_it_covers_it():
    assert windows.fitted(7, (5, 9)) == (5, 7)
    assert windows.fitted((3, 7), (5, 5)) == (3, 5)
    assert windows.shift_of((5, 7), (5, 9), True) == (0, 3)
    assert windows.shift_of((5, 7), (10, 9), False) == (0, 0)


@pytest.mark.parametrize(
    ("grid", "window", "shift"),
    [((6, 9), (3, 3), (1, 1)), ((4, 8), (4, 4), (0, 2)), ((8, 4), (4, 2), (2, 1))],
)
def test_places_see_each_other_where_no_edge_lies_between_them(grid, window, shift):
    """Each place carries where it stood; a rolled window may hold places from both ends of the map."""
    rows, columns = np.meshgrid(*map(np.arange, grid), indexing="ij")
    stood = np.roll(np.stack([rows, columns], -1), (-shift[0], -shift[1]), (0, 1))[None]
    cut = windows.partition(stood, window)[0]  # [windows, places, 2]
    near = np.abs(cut[:, :, None] - cut[:, None]) < np.array(window)  # as far apart as within a window
    np.testing.assert_array_equal(windows.allowed_after_shift(grid, window, shift), near.all(-1))
    assert windows.allowed_after_shift(grid, window, (0, 0)) is None


def test_offsets_go_from_keys_to_queries():
    offsets = windows.offsets((2, 3))
    assert offsets.shape == (6, 6, 2)
    np.testing.assert_array_equal(offsets[5, 0], (1, 2))
    np.testing.assert_array_equal(offsets[0, 4], (-1, -1))


def test_attention_with_a_factor_a_head_a_bias_and_a_mask():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 2, 4, 3, 5))
    scale, bias = jnp.array([0.5, 1.0, 2.0]), jax.random.normal(jax.random.key(1), (3, 4, 4))
    allowed = np.random.default_rng(0).random((2, 4, 4)) < 0.6
    allowed |= np.eye(4, dtype=bool)[None]
    y = windows.window_attention(q, k, v, scale=scale, bias=bias, allowed=allowed)
    for b, w, i, h in np.ndindex(2, 2, 4, 3):
        logits = np.array([float(scale[h]) * float(q[b, w, i, h] @ k[b, w, j, h]) for j in range(4)])
        weights = np.where(allowed[w, i], np.exp(logits + np.asarray(bias[h, i])), 0.0)
        np.testing.assert_allclose(
            y[b, w, i, h], weights @ np.asarray(v[b, w, :, h]) / weights.sum(), atol=1e-5
        )
