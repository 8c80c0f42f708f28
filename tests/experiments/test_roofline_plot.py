"""The roofline picture: its lines say what the arithmetic says, and every name can be read."""

import itertools

import numpy as np
import pytest

from effjax.errors import UsageError
from effjax.measure import attainable, chip
from experiments.run import roofline_plot
from experiments.run.roofline_plot import roofline

POINTS = {"gelu": (0.5, 2e11), "decode step": (2.0, None), "ViT": (180.0, 8e13), "DiT": (170.0, 7.5e13)}


@pytest.fixture
def drawn(monkeypatch):
    """Draws and returns the axes, which the function itself keeps."""

    def draw(*arguments):
        kept = []
        monkeypatch.setattr(roofline_plot, "png", lambda figure: kept.append(figure) or b"")
        roofline(*arguments)
        return kept[0].axes[0]

    return draw


def test_the_roof_is_what_is_attainable(drawn):
    axes = drawn(chip("v5e"), "bfloat16", POINTS)
    roof = axes.lines[0]
    for intensity, height in roof.get_xydata():
        assert height == pytest.approx(attainable(intensity, chip("v5e"), "bfloat16"))
    assert roof.get_xydata()[1] == pytest.approx([197e12 / 820e9, 197e12])


def test_points_lie_where_they_were_measured_and_else_on_the_roof(drawn):
    axes = drawn(chip("v5e"), "bfloat16", POINTS)
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    assert [tuple(dot.get_xydata()[0]) for dot in dots] == [
        (0.5, 2e11),
        (2.0, 2 * 820e9),
        (180.0, 8e13),
        (170.0, 7.5e13),
    ]
    assert [dot.get_markerfacecolor() == "white" for dot in dots] == [False, True, False, False]
    left, right = axes.get_xlim()
    assert left < 0.5
    assert right > 180


def test_every_name_is_inside_and_covers_no_other(drawn):
    axes = drawn(chip("v5e"), "bfloat16", POINTS)
    assert {text.get_text() for text in axes.texts} == {*POINTS, "197 TFLOP/s", "820 GB/s", "ridge 240"}
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert all(axes.get_window_extent().count_contains(np.array(box.corners())) == 4 for box in boxes)


def test_the_same_figures_give_the_same_bytes_in_a_file(tmp_path):
    roofline_plot.roofline_plot(tmp_path / "plots" / "roof.png", chip("h100"), "float8", {})
    written = (tmp_path / "plots" / "roof.png").read_bytes()
    assert written.startswith(b"\x89PNG")
    assert written == roofline(chip("h100"), "float8", {})
    assert [path.name for path in tmp_path.rglob("*.*")] == ["roof.png"]


def test_a_point_without_a_place_and_a_dtype_without_a_rate_are_usage_errors():
    with pytest.raises(UsageError, match="'copy' has no place on logarithmic axes"):
        roofline(chip("v5e"), "bfloat16", {"copy": (0.0, None)})
    with pytest.raises(UsageError, match="v5e has no rate for float8"):
        roofline(chip("v5e"), "float8_e4m3fn", {})
