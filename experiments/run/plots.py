"""Plots of a run as PNG bytes; the caller writes them under `plots/`.

Figures are made through matplotlib's objects, never through pyplot, whose hidden current figure would be
shared by everything in the process.
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

COLOURS = ("#2f6fdb", "#d9622b", "#2a9d6f", "#9a52c7", "#b8860b", "#c23b5a")
_SMOOTHED_FROM = 20  # points; fewer are drawn as they are


def curve_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The metrics that `rows` of a `metrics.jsonl` hold, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row if name not in ("step", "split")))


def curve(rows: Sequence[Mapping[str, Any]], name: str, *, smoothing: float = 0.01) -> bytes:
    """Draws one metric over steps, a line for every split that has it.

    A training curve of many points is drawn faintly, with its smoothed course above it (see `smooth`).
    Values that are not finite leave gaps.

    Args:
      rows: lines of `metrics.jsonl`.
      name: the metric.
      smoothing: width of the average as a share of the curve.

    Raises:
      KeyError: if no row has the metric.
    """
    splits = list(dict.fromkeys(row["split"] for row in rows if name in row))
    if not splits:
        raise KeyError(name)
    figure, axes = new_figure(layout=None)
    # Room for a number of nine characters: to measure what the labels need would be to draw them twice.
    figure.subplots_adjust(left=0.13, right=0.98, top=0.91, bottom=0.14)
    for split, colour in zip(splits, COLOURS * (len(splits) // len(COLOURS) + 1), strict=False):
        points = [(row["step"], row[name]) for row in rows if row["split"] == split and name in row]
        steps, values = np.array(points, np.float64).T
        if split == "train" and len(points) >= _SMOOTHED_FROM and name != "learning_rate":
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
            axes.plot(
                steps,
                smooth(values, max(1.0, smoothing * len(values))),
                color=colour,
                linewidth=1.8,
                label=split,
            )
        else:
            marker = "o" if len(points) < _SMOOTHED_FROM else None
            axes.plot(steps, values, color=colour, linewidth=1.8, marker=marker, markersize=4, label=split)
    axes.set_title(name.replace("_", " "), loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    if len(splits) > 1:
        axes.legend(frameon=False)
    return png(figure)


def smooth(values: Float[np.ndarray, " n"], width: float) -> Float[np.ndarray, " n"]:
    """Average under a bell: m_i = sum_j w(i-j) x_j / sum_j w(i-j), w(d) = exp(-d^2 / 2 width^2).

    It looks both ways, so a falling loss is not shown later than it fell, as a running average would. Values
    that are not finite have no weight, and stay gaps.
    """
    reach = math.ceil(3 * width)
    bell = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    finite = np.isfinite(values)
    total = np.convolve(np.where(finite, values, 0.0), bell)[reach:-reach]
    mass = np.convolve(finite.astype(np.float64), bell)[reach:-reach]
    return np.divide(total, mass, out=np.full(len(values), np.nan), where=finite)


def image_grid(images: UInt8[np.ndarray, "n h w c"], columns: int, *, least_pixels: int = 64) -> bytes:
    """Puts pictures side by side, row by row.

    Args:
      images: grey (c = 1) or coloured (c = 3).
      columns: pictures in a row.
      least_pixels: smaller pictures are enlarged to at least this height, by a whole factor and without blur,
        so that their pixels can be seen.

    Returns:
      A PNG; places left over in the last row are white.
    """
    return _file([_sheet(images, columns, least_pixels)], "PNG", optimize=True)


def moving_grid(
    videos: UInt8[np.ndarray, "n f h w c"],
    columns: int,
    *,
    least_pixels: int = 64,
    milliseconds: int = 160,
) -> bytes:
    """Puts videos side by side like `image_grid`, all running together, over and over.

    Args:
      videos: grey (c = 1) or coloured (c = 3).
      columns: videos in a row.
      least_pixels: smaller ones are enlarged to at least this height.
      milliseconds: how long a frame is shown.

    Returns:
      A GIF, which holds 256 colours a frame.
    """
    sheets = [_sheet(videos[:, i], columns, least_pixels) for i in range(videos.shape[1])]
    return _file(sheets, "GIF", save_all=True, duration=milliseconds, loop=0)


def film_strips(videos: UInt8[np.ndarray, "n f h w c"]) -> UInt8[np.ndarray, "n h fw c"]:
    """Every video as one picture, its frames from left to right."""
    return np.concatenate(np.moveaxis(videos, 1, 0), axis=2)


def _sheet(images: UInt8[np.ndarray, "n h w c"], columns: int, least_pixels: int) -> np.ndarray:
    """Pictures side by side, with white between them."""
    number, height, width, channels = images.shape
    if channels not in (1, 3):
        raise ValueError(f"A picture has 1 or 3 channels, not {channels}.")
    columns = min(columns, number)
    rows, factor, gap = -(-number // columns), max(1, -(-least_pixels // height)), 4
    cell_height, cell_width = height * factor + gap, width * factor + gap
    sheet = np.full((rows * cell_height + gap, columns * cell_width + gap, channels), 255, np.uint8)
    for index, picture in enumerate(images.repeat(factor, axis=1).repeat(factor, axis=2)):
        top, left = index // columns * cell_height + gap, index % columns * cell_width + gap
        sheet[top : top + height * factor, left : left + width * factor] = picture
    return sheet if channels == 3 else sheet[..., 0]


def _file(sheets: Sequence[np.ndarray], kind: str, **options: Any) -> bytes:
    """Frames as the bytes of a picture file."""
    first, *more = (Image.fromarray(sheet) for sheet in sheets)
    buffer = io.BytesIO()
    first.save(buffer, kind, **(options | {"append_images": more} if more else options))
    return buffer.getvalue()


def pareto(
    points: Mapping[str, tuple[float, float]], x_label: str, y_label: str, *, larger_is_better: bool = True
) -> bytes:
    """Draws what each candidate costs and reaches, and the front of those that none beats in both.

    Args:
      points: cost and quality by name.
      x_label: what the cost is; less is better.
      y_label: what the quality is.
      larger_is_better: whether more of it is better, as of an accuracy; less is, of a perplexity.
    """
    figure, axes = new_figure()
    names = list(points)
    cost, reached = np.array([points[name] for name in names], np.float64).T
    best = set(front_of(cost, reached if larger_is_better else -reached))
    order = sorted(best, key=lambda i: cost[i])
    axes.plot(cost[order], reached[order], color=COLOURS[0], linewidth=1.2, alpha=0.6)
    for i, name in enumerate(names):
        axes.scatter(cost[i], reached[i], color=COLOURS[0] if i in best else "#9aa4b1", s=22, zorder=3)
        axes.annotate(name, (cost[i], reached[i]), fontsize=6, xytext=(4, 3), textcoords="offset points")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.margins(x=0.2, y=0.15)
    return png(figure)


def swept(
    values: Sequence[str], reached: Sequence[float], x_label: str, y_label: str, *, log: bool = False
) -> bytes:
    """Draws what runs with different values of one key reached; words stand side by side."""
    figure, axes = new_figure()
    try:
        places: list[float] | list[int] = [float(value) for value in values]
    except ValueError:
        names = list(dict.fromkeys(values))
        places = [names.index(value) for value in values]
        axes.set_xticks(range(len(names)), names)
    else:
        # Learning rates in a list are meant by their factors as well.
        if log or (min(places) > 0 and max(places) >= 10 * min(places)):
            axes.set_xscale("log")
    axes.scatter(places, reached, color=COLOURS[0], s=22, zorder=3)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return png(figure)


def front_of(cost: Float[np.ndarray, " n"], quality: Float[np.ndarray, " n"]) -> list[int]:
    """Places of the points that no other beats: cheaper and no worse, or better and no dearer."""
    better = (cost[None] <= cost[:, None]) & (quality[None] >= quality[:, None])
    strictly = (cost[None] < cost[:, None]) | (quality[None] > quality[:, None])
    return [int(i) for i in np.flatnonzero(~np.any(better & strictly, axis=1))]


def new_figure(
    width: float = 6.4, height: float = 3.6, *, layout: Literal["constrained"] | None = "constrained"
) -> tuple[Figure, Axes]:
    """An empty figure in the style of all plots here; without a layout its margins are the caller's."""
    figure = Figure(figsize=(width, height), dpi=140, layout=layout)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def png(figure: Figure) -> bytes:
    """A figure as PNG bytes."""
    buffer = io.BytesIO()
    # Without the default metadata: the same numbers then give the same bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
