import io
import math
import sys

import numpy as np
import pytest
from PIL import Image

from experiments.run.plots import curve, curve_names, image_grid, smooth


def picture(png):
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG"
    return np.asarray(image.convert("RGB"))


def rows(values, split="train", name="loss"):
    return [{"step": step, "split": split, name: value} for step, value in enumerate(values)]


def coloured(pixels, colour):
    """How many pixels are of nearly this colour."""
    return int((np.abs(pixels.astype(int) - colour).max(-1) < 12).sum())


BLUE, ORANGE = (0x2F, 0x6F, 0xDB), (0xD9, 0x62, 0x2B)


def test_every_split_has_its_line():
    train = picture(curve(rows([3.0, 2.0, 1.0]), "loss"))
    assert coloured(train, BLUE) > 100
    assert coloured(train, ORANGE) == 0
    both = picture(curve(rows([3.0, 2.0, 1.0]) + rows([3.0, 2.5, 2.0], "test"), "loss"))
    assert coloured(both, BLUE) > 100
    assert coloured(both, ORANGE) > 100


def test_the_same_numbers_give_the_same_bytes():
    data = rows([1.0, 2.0])
    assert curve(data, "loss") == curve(data, "loss")


def test_values_that_are_not_finite_do_not_spoil_the_plot():
    values = [1.0, math.nan, 2.0, math.inf, 3.0] * 8
    assert coloured(picture(curve(rows(values), "loss")), BLUE) > 100


def test_an_unknown_metric_is_refused():
    with pytest.raises(KeyError, match="accuracy"):
        curve(rows([1.0]), "accuracy")


def test_names_come_in_order_of_appearance():
    assert curve_names([*rows([1.0]), *rows([1.0], "test", "accuracy")]) == ["loss", "accuracy"]


def test_smoothing_keeps_constants_lines_and_gaps():
    constant = np.full(50, 3.0)
    np.testing.assert_allclose(smooth(constant, 2.0), constant, rtol=1e-12)
    line = np.arange(50.0)
    # No lag: inside, a straight line stays where it is.
    np.testing.assert_allclose(smooth(line, 2.0)[6:-6], line[6:-6], rtol=1e-12)
    holed = constant.copy()
    holed[[7, 8]] = math.nan, math.inf
    result = smooth(holed, 2.0)
    assert np.isnan(result[[7, 8]]).all()
    np.testing.assert_allclose(np.delete(result, [7, 8]), 3.0, rtol=1e-12)
    assert smooth(np.array([1.0, 2.0]), 1.0).shape == (2,)


def test_smoothing_removes_noise():
    noise = np.random.default_rng(0).standard_normal(2000)
    # The variance of the average is that of the noise over 2 sqrt(pi) width.
    assert smooth(noise, 10.0).std() == pytest.approx((1 / (2 * math.sqrt(math.pi) * 10)) ** 0.5, rel=0.2)


def test_a_grid_puts_each_picture_in_its_place():
    images = np.stack([np.full((8, 8, 3), 40 * index, np.uint8) for index in range(5)])
    sheet = picture(image_grid(images, 3, least_pixels=16))
    assert sheet.shape == (2 * 20 + 4, 3 * 20 + 4, 3)
    for index in range(5):
        top, left = index // 3 * 20 + 4, index % 3 * 20 + 4
        assert (sheet[top : top + 16, left : left + 16] == 40 * index).all()
    assert (sheet[24:, 44:] == 255).all()


def test_a_grid_enlarges_without_blur_and_takes_grey():
    image = np.arange(4, dtype=np.uint8).reshape(1, 2, 2, 1) * 80
    sheet = picture(image_grid(image, 8, least_pixels=3))
    np.testing.assert_array_equal(sheet[4:8, 4:8, 0], image[0, :, :, 0].repeat(2, 0).repeat(2, 1))
    with pytest.raises(ValueError, match="not 2"):
        image_grid(np.zeros((1, 2, 2, 2), np.uint8), 1)


def test_no_global_figure_state_is_used():
    curve(rows([1.0, 2.0]), "loss")
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()
