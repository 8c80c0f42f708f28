"""The roofline of a chip as a picture: what its memory and its arithmetic allow, and what was reached."""

import itertools
import math
import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter
from matplotlib.transforms import Bbox

from effjax.errors import UsageError
from effjax.measure import Chip, attainable, ridge, short
from experiments.run.files import write_atomic
from experiments.run.plots import COLOURS, new_figure, png

Points = Mapping[str, tuple[float, float | None]]

_ROOF = "#333333"
# Where a name may stand beside its point, in typographic points: the first place that is free is taken.
_BESIDE = (-4, -15, 7, -26, 18)
_PLACES = tuple((side, height) for height in _BESIDE for side in (7, -7))


def roofline_plot(path: str | os.PathLike[str], chip: Chip, dtype: str, points: Points) -> None:
    """Draws `roofline` into a file.

    Raises:
      UsageError: for a dtype without a rate on this chip, or a point that is not above zero.
      RunError: if the file cannot be written.
    """
    write_atomic(path, roofline(chip, dtype, points))


def roofline(chip: Chip, dtype: str, points: Points) -> bytes:
    """Draws the roof min(peak, intensity x bandwidth) of a chip, and points under it.

    Args:
      chip: from the table or `measure_cpu`, whose memory beyond the caches is a second, dashed roof.
      dtype: the operands of the matrix products: which peak.
      points: by name, the arithmetic intensity in FLOP a byte and the FLOP/s achieved. Where nothing was
        measured, None draws a ring on the roof: the most that work of this intensity can reach.

    Returns:
      A PNG.

    Raises:
      UsageError: for a dtype without a rate on this chip, or a point that is not above zero.
    """
    for name, (intensity, achieved) in points.items():
        if not 0 < intensity < math.inf or (achieved is not None and not 0 < achieved < math.inf):
            raise UsageError(
                f"{name!r} has no place on logarithmic axes: {intensity} FLOP/byte, {achieved} FLOP/s."
            )
    corner, peak = ridge(chip, dtype), chip.fastest(dtype)
    reached = [(x, attainable(x, chip, dtype) if y is None else y) for x, y in points.values()]
    left = min([corner / 30, *(x / 2.5 for x, _ in reached)])
    right = max([corner * 30, *(x * 8 for x, _ in reached)])
    bottom = min([attainable(left, chip, dtype), *(y / 3 for _, y in reached)])
    figure, axes = new_figure(height=4.2)
    figure.set_canvas(FigureCanvasAgg(figure))
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(left, right),
        ylim=(bottom, 3 * max(peak, *(y for _, y in reached), 0)),
    )
    _draw_roofs(axes, chip, dtype, left, right)
    axes.set_title(f"{chip.name}, {dtype}", loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("arithmetic intensity (FLOP/byte)")
    axes.set_ylabel("FLOP/s")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: _power(value)))
    figure.draw_without_rendering()  # names are placed where the final layout leaves room
    _draw_points(axes, points, reached)
    return png(figure)


def _draw_roofs(axes: Axes, chip: Chip, dtype: str, left: float, right: float) -> None:
    corner, peak = ridge(chip, dtype), chip.fastest(dtype)
    roof = ([left, corner, right], [left * chip.bandwidth, peak, peak])
    axes.plot(*roof, color=_ROOF, linewidth=1.8)
    axes.fill_between(*roof, color=_ROOF, alpha=0.05, linewidth=0)
    axes.plot([corner, corner], [axes.get_ylim()[0], peak], color=_ROOF, linewidth=0.8, linestyle=":")
    _note(axes, f"{_figure(peak)}FLOP/s", (right, peak), (-4, 4), horizontal="right")
    _note(
        axes,
        f"{_figure(chip.bandwidth)}B/s",
        _middle(left, corner, chip.bandwidth),
        (-4, 4),
        horizontal="right",
    )
    _note(axes, f"ridge {corner:.3g}", (corner, axes.get_ylim()[0]), (4, 5))
    if chip.uncached is not None:
        end = min(right, peak / chip.uncached)
        axes.plot(
            [left, end],
            [left * chip.uncached, end * chip.uncached],
            color=_ROOF,
            linewidth=1.2,
            linestyle="--",
        )
        label = f"{_figure(chip.uncached)}B/s beyond the caches"
        _note(axes, label, _middle(corner, end, chip.uncached), (6, -9))


def _draw_points(axes: Axes, points: Points, reached: Sequence[tuple[float, float]]) -> None:
    taken = [*_along(axes.lines), *(text.get_window_extent() for text in axes.texts)]
    taken += [_around(spot, 6) for spot in axes.transData.transform(reached)] if reached else []
    for number, (name, (_, achieved)) in enumerate(points.items()):
        colour, place = COLOURS[number % len(COLOURS)], reached[number]
        face = colour if achieved is not None else "white"
        axes.plot(
            *place, "o", color=colour, markerfacecolor=face, markersize=6, markeredgewidth=1.6, zorder=3
        )
        taken.append(_name(axes, name, place, colour, taken).padded(2))


def _along(lines: Sequence[Line2D]) -> list[Bbox]:
    """Small boxes close together along the roofs, in pixels; the dotted line of the ridge may be crossed."""
    boxes = []
    for line in lines:
        if line.get_linestyle() == ":":
            continue
        corners = line.get_transform().transform(line.get_xydata())
        for start, end in itertools.pairwise(corners):
            steps = 1 + int(np.hypot(*(end - start)) // 4)
            boxes += [_around(spot, 1) for spot in np.linspace(start, end, steps + 1)]
    return boxes


def _around(spot: np.ndarray, pixels: float) -> Bbox:
    return Bbox([spot - pixels, spot + pixels])


def _name(axes: Axes, name: str, place: tuple[float, float], colour: str, taken: Sequence[Bbox]) -> Bbox:
    """Writes a name in the first of `_PLACES` that is inside and covers nothing, else in the very first."""
    inside = axes.get_window_extent()
    for offset in _PLACES:
        side = "left" if offset[0] > 0 else "right"
        text = _note(axes, name, place, offset, horizontal=side, colour=colour)
        box = text.get_window_extent()
        if inside.count_contains(box.corners()) == 4 and not any(box.overlaps(other) for other in taken):
            return box
        text.remove()
    return _note(axes, name, place, _PLACES[0], colour=colour).get_window_extent()


def _note(
    axes: Axes,
    text: str,
    place: tuple[float, float],
    offset: tuple[float, float],
    *,
    horizontal: str = "left",
    colour: str = _ROOF,
) -> Annotation:
    note = axes.annotate(
        text, place, xytext=offset, textcoords="offset points", ha=horizontal, fontsize=8, color=colour
    )
    note.set_path_effects([withStroke(linewidth=2, foreground="white")])
    note.set_in_layout(False)
    return note


def _middle(left: float, right: float, bandwidth: float) -> tuple[float, float]:
    """The point of a memory roof halfway between two intensities, as logarithmic axes show them."""
    middle = math.sqrt(left * right)
    return middle, middle * bandwidth


def _figure(number: float) -> str:
    """`197T` as `197 T`, before a unit."""
    text = short(number)
    return f"{text[:-1]} {text[-1]}" if text[-1].isalpha() else f"{text} "


def _power(value: float) -> str:
    """Ticks: `10T`, but `0.01` below one."""
    return f"{value:g}" if value < 1 else short(value).replace(".00", "").replace(".0", "")
