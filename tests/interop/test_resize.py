import ml_dtypes
import numpy as np
import pytest

from effjax.interop.resize import (
    Patches,
    Positions,
    RelativeBias,
    Request,
    cubic_matrix,
    resize_patches,
    resize_positions,
    resize_relative_bias,
)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(("old", "new"), [(14, 24), (24, 14), (3, 11), (16, 5), (1, 4), (5, 1)])
def test_every_row_of_the_cubic_is_an_average(old, new, antialias):
    matrix = cubic_matrix(old, new, antialias)
    assert matrix.shape == (new, old)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(matrix, matrix[::-1, ::-1], atol=1e-6)  # it knows no left and right


def test_the_cubic_of_the_same_size_is_the_identity():
    np.testing.assert_array_equal(cubic_matrix(7, 7), np.eye(7))


def test_halving_averages_as_the_widened_cubic_says():
    # The cubic with a = -1/2 at distances 1/4, 3/4, 5/4, 7/4 of the halved axis, normalised.
    row = cubic_matrix(16, 8)[4]
    near = np.array([0.8671875, 0.2265625, -0.0703125, -0.0234375])
    taps = np.concatenate([near[::-1], near]) / (2 * near.sum())
    np.testing.assert_allclose(row[5:13], taps, atol=1e-6)
    assert np.count_nonzero(np.abs(row) > 1e-9) == 8


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_positions_keep_the_prefix_and_planes(prefix, draw):
    rows, columns = np.mgrid[0:8, 0:8].astype(np.float32) + 0.5
    plane = np.stack([rows, columns, rows + columns], -1).reshape(64, 3)
    front = draw.standard_normal((prefix, 3)).astype(np.float32)
    table = resize_positions(np.concatenate([front, plane])[None], (8, 8), (16, 4), prefix)
    assert table.shape == (1, prefix + 64, 3)
    np.testing.assert_array_equal(table[0, :prefix], front)
    grid = table[0, prefix:].reshape(16, 4, 3)
    np.testing.assert_allclose(grid[4:12, 2, 0], (np.arange(4, 12) + 0.5) / 2, atol=1e-5)  # inside, exact


def test_half_precision_stays_half(draw):
    table = draw.standard_normal((1, 16, 4)).astype(ml_dtypes.bfloat16)
    assert resize_positions(table, (4, 4), (6, 6)).dtype == ml_dtypes.bfloat16


def test_larger_patches_give_the_same_tokens_on_enlarged_pictures(draw):
    kernel = draw.standard_normal((5, 3, 8, 8)).astype(np.float32)
    patch = draw.standard_normal((3, 8, 8)).astype(np.float32)
    grow = cubic_matrix(8, 12)
    enlarged = np.einsum("ih,jw,chw->cij", grow, grow, patch)
    tokens = np.einsum("ochw,chw->o", kernel, patch)
    np.testing.assert_allclose(
        np.einsum("ochw,chw->o", resize_patches(kernel, (12, 12)), enlarged), tokens, rtol=1e-3, atol=1e-3
    )


def test_relative_bias_keeps_its_centre_and_symmetry(draw):
    table = draw.standard_normal((13 * 13 + 3, 4)).astype(np.float32)
    grown = resize_relative_bias(table, (13, 13), (23, 23))
    assert grown.shape == (23 * 23 + 3, 4)
    np.testing.assert_array_equal(grown[-3:], table[-3:])
    old, new = table[:-3].reshape(13, 13, 4), grown[:-3].reshape(23, 23, 4)
    np.testing.assert_allclose(new[11, 11], old[6, 6], atol=1e-6)
    np.testing.assert_allclose(new[11 - 1 : 11 + 2, 11], old[6 - 1 : 6 + 2, 6], atol=1e-6)  # neighbours too
    flipped = resize_relative_bias(table[:-3].reshape(13, 13, 4)[::-1].reshape(-1, 4), (13, 13), (23, 23))
    np.testing.assert_allclose(flipped.reshape(23, 23, 4), new[::-1], atol=1e-5)


@pytest.mark.parametrize(
    ("resize", "found", "shape", "said"),
    [
        (Positions(8, 1), (1, 7, 4), (1, 5, 4), "on no square"),
        (Positions(8, 1), (1, 17, 6), (1, 5, 4), "in its tokens alone"),
        (Positions(8, 2), (1, 18, 4), (1, 5, 4), "not the grid of the pictures"),
        (RelativeBias((4, 4)), (50, 3), (49, 3), "no square window"),
        (RelativeBias((4, 4)), (64, 3), (49, 3), "no square window"),  # an even side is no window's
        (RelativeBias((4, 4)), (25, 2), (49, 3), "in its places alone"),
        (Patches(), (5, 1, 8, 8), (5, 3, 4, 4), "height and width alone"),
        (Patches(), (5, 3, 500, 500), (5, 3, 4, 4), "more than 64"),
    ],
)
def test_what_cannot_be_resized_says_why(resize, found, shape, said):
    assert said in resize.prepare(found, shape, Request(picture=(16, 16)))


def test_windows_and_grids_that_are_not_square(draw):
    table = draw.standard_normal((3 * 5, 2)).astype(np.float32)
    change = RelativeBias((3, 3), source_window=(2, 3)).prepare((15, 2), (25, 2), Request())
    assert change(table).shape == (25, 2)
    change = Positions(8).prepare((1, 6, 2), (1, 4, 2), Request((16, 16), (2, 3)))
    assert change(draw.standard_normal((1, 6, 2)).astype(np.float32)).shape == (1, 4, 2)
