"""Resizing against timm's and torch's own."""

import numpy as np
import pytest
import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed, resize_rel_pos_bias_table
from torch.nn.functional import interpolate

from effjax.interop.resize import cubic_matrix, resize_patches, resize_positions, resize_relative_bias


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(("old", "new"), [(14, 24), (24, 14), (7, 7), (3, 11), (16, 5), (1, 4), (5, 1)])
def test_the_cubic_is_that_of_torch(old, new, antialias):
    x = torch.eye(old)[None, :, :, None].repeat(1, 1, 1, 4)  # one row a channel
    theirs = interpolate(x, size=(new, 4), mode="bicubic", antialias=antialias)[0, :, :, 0].numpy().T
    np.testing.assert_allclose(cubic_matrix(old, new, antialias), theirs, atol=3e-6)


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize(("old", "new"), [((14, 14), (24, 24)), ((8, 8), (5, 9)), ((4, 6), (6, 4))])
def test_positions(old, new, prefix):
    table = np.random.default_rng(0).standard_normal((1, prefix + old[0] * old[1], 6), dtype=np.float32)
    theirs = resample_abs_pos_embed(torch.from_numpy(table), list(new), list(old), prefix).numpy()
    np.testing.assert_allclose(resize_positions(table, old, new, prefix), theirs, atol=1e-5)


@pytest.mark.parametrize(("old", "new"), [((16, 16), (8, 8)), ((8, 8), (16, 16)), ((4, 4), (7, 5))])
def test_patches(old, new):
    kernel = np.random.default_rng(0).standard_normal((5, 3, *old), dtype=np.float32)
    theirs = resample_patch_embed(torch.from_numpy(kernel), list(new)).numpy()
    np.testing.assert_allclose(resize_patches(kernel, new), theirs, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize(("old", "new"), [((7, 7), (12, 12)), ((12, 12), (7, 7)), ((8, 8), (8, 16))])
@pytest.mark.parametrize("extra", [0, 3])
def test_relative_bias(old, new, extra):
    offsets = [tuple(2 * side - 1 for side in window) for window in (old, new)]
    shapes = [(h * w + extra, 4) for h, w in offsets]
    table = np.random.default_rng(0).standard_normal(shapes[0], dtype=np.float32)
    theirs = resize_rel_pos_bias_table(torch.from_numpy(table), new, shapes[1]).numpy()
    np.testing.assert_allclose(resize_relative_bias(table, *offsets), theirs, atol=2e-4)
