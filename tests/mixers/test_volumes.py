import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.mixers import volumes, windows

CASES = [
    ((4, 6, 6), (2, 3, 2), True),
    ((3, 5, 4), (2, 4, 4), True),  # padded along frames and rows, one window across
    ((5, 4, 7), (2, 2, 3), False),
    ((1, 6, 9), (1, 3, 3), True),
    ((2, 3, 3), (4, 7, 7), True),  # one window covers everything
]


def geometry(grid, window, shifted):
    size = volumes.fitted(window, grid)
    return size, volumes.shift_of(size, grid, shifted)


def test_windows_are_counted_frame_by_frame_and_row_by_row():
    x = np.arange(2 * 4 * 6 * 4 * 3).reshape(2, 4, 6, 4, 3)
    cut = volumes.partition(x, (2, 3, 2))
    for b, t, i, j in np.ndindex(2, 4, 6, 4):
        window, place = (t // 2 * 2 + i // 3) * 2 + j // 2, (t % 2 * 3 + i % 3) * 2 + j % 2
        np.testing.assert_array_equal(cut[b, window, place], x[b, t, i, j])
    np.testing.assert_array_equal(volumes.reverse(jnp.asarray(cut, jnp.float32), (4, 6, 4), (2, 3, 2)), x)


@pytest.mark.parametrize(("grid", "window", "shifted"), CASES)
def test_laying_out_undoes_cutting(grid, window, shifted):
    x = jax.random.normal(jax.random.key(0), (2, *grid, 3))
    size, shift = geometry(grid, window, shifted)
    np.testing.assert_array_equal(volumes.laid_out(volumes.cut(x, size, shift), grid, size, shift), x)


@pytest.mark.parametrize(("grid", "window", "shifted"), CASES)
def test_places_see_each_other_where_they_stood_together(grid, window, shifted):
    """Every place carries where it stood through a roll; a window's edge or the padding parts places."""
    size, shift = geometry(grid, window, shifted)
    whole = volumes.tiled(grid, size)
    stood = np.stack(np.meshgrid(*map(np.arange, whole), indexing="ij"), -1)
    cut = volumes.partition(np.roll(stood, [-s for s in shift], (0, 1, 2))[None], size)[0]
    inside = (cut < np.array(grid)).all(-1)  # [windows, places]
    near = (np.abs(cut[:, :, None] - cut[:, None]) < np.array(size)).all(-1)
    mask = volumes.allowed(grid, size, shift)
    mask = np.ones_like(near) if mask is None else mask
    seen = inside[:, :, None] & inside[:, None, :]
    np.testing.assert_array_equal(mask & inside[:, :, None], near & seen)
    assert mask.any(-1).all()


@pytest.mark.parametrize(("grid", "window", "shifted"), CASES)
def test_attention_is_that_over_the_places_of_ones_own_window(grid, window, shifted):
    """By brute force: windows are laid on the volume with their corners at the shift, and cut at its ends."""
    size, shift = geometry(grid, window, shifted)
    x = jax.random.normal(jax.random.key(1), (1, *grid, 4))
    cut = volumes.cut(x, size, shift)[:, :, :, None]
    y = windows.window_attention(cut, cut, cut, scale=0.7, allowed=volumes.allowed(grid, size, shift))
    y = volumes.laid_out(y[:, :, :, 0], grid, size, shift)[0]
    where = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1).reshape(-1, 3)
    own = (where - np.array(shift)) // np.array(size)  # the window of each place
    flat = np.asarray(x, np.float64).reshape(-1, 4)
    for place, window_of in enumerate(own):
        keys = flat[(own == window_of).all(-1)]
        weights = np.exp(0.7 * keys @ flat[place])
        np.testing.assert_allclose(
            y.reshape(-1, 4)[place], weights @ keys / weights.sum(), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("shifted", [False, True])
def test_a_map_is_the_volume_of_one_frame(shifted):
    x = jax.random.normal(jax.random.key(2), (2, 7, 10, 3))
    size, shift = geometry((1, 7, 10), (1, 4, 4), shifted)
    assert (size[1:], shift[1:]) == ((4, 4), windows.shift_of((4, 4), (7, 10), shifted))
    flat = windows.partition(windows.rolled(windows.tiled(x, (4, 4)), (-shift[1], -shift[2])), (4, 4))
    np.testing.assert_array_equal(volumes.cut(x[:, None], size, shift), flat)
    mask, flat_mask = (
        volumes.allowed((1, 8, 12), size, shift),
        windows.allowed_after_shift((8, 12), (4, 4), shift[1:]),
    )
    assert (mask is None) == (flat_mask is None) == (not shifted)
    if shifted:
        np.testing.assert_array_equal(mask, flat_mask)
