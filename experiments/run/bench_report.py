"""The results of `bench models` as a table, as JSON and as a plot."""

import os
import platform
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.run.bench_models import Pair, Result
from experiments.run.files import to_json, write_atomic
from experiments.run.formatting import count
from experiments.run.plots import COLOURS, png

HEADINGS = (
    "model",
    "parameters",
    "MACs",
    "top-1",
    "step",
    "images/s",
    "timm images/s",
    "ratio",
    "quartiles",
    "CPU ratio",
    "peak",
    "timm peak",
)


def write(folder: str | os.PathLike[str], results: Sequence[Result]) -> None:
    """Writes `bench.md`, `bench.json` and `bench.png` into a folder.

    Raises:
      RunError: if a file cannot be written.
    """
    folder = Path(folder)
    said = dict(environment=environment(), results=[result.record() for result in results])
    write_atomic(folder / "bench.json", to_json(said))
    write_atomic(folder / "bench.md", markdown(results))
    write_atomic(folder / "bench.png", plot(results))


def environment() -> dict[str, Any]:
    """What the figures depend on besides the models."""
    packages = {}
    for name in ("jax", "jaxlib", "flax", "torch", "timm"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return dict(
        packages=packages,
        python=platform.python_version(),
        cores=len(os.sched_getaffinity(0)),
        load=os.getloadavg()[0],
    )


def rows(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """One row a model and step, in the order of `HEADINGS`; a dash where nothing is known."""
    return [_row(result, step, pair) for result in results for step, pair in result.steps.items()]


def _row(result: Result, step: str, pair: Pair) -> tuple[str, ...]:
    def of(side: Any, form: Callable[[Any], str]) -> str:
        return "-" if side is None else form(side)

    return (
        result.config,
        count(result.parameters),
        count(result.macs),
        of(result.top1, lambda top1: f"{top1:.1f}%"),
        step,
        of(pair.ours, lambda side: f"{result.batch / min(side.seconds):.4g}"),
        of(pair.timm, lambda side: f"{result.batch / min(side.seconds):.4g}"),
        of(pair.ratio, lambda ratio: f"{ratio:.2f}"),
        of(pair.spread, lambda spread: f"{spread[0]:.2f} to {spread[1]:.2f}"),
        of(pair.cpu_ratio, lambda ratio: f"{ratio:.2f}"),
        of(pair.ours, lambda side: f"{count(side.peak)}B"),
        of(pair.timm, lambda side: f"{count(side.peak)}B"),
    )


def markdown(results: Sequence[Result]) -> str:
    """The table, and under it what its columns say."""
    lines = [HEADINGS, ("---",) * len(HEADINGS), *rows(results)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    here = environment()
    packages = ", ".join(f"{name} {version}" for name, version in here["packages"].items())
    pictures = sorted({f"{one.batch} x {one.size[0]} x {one.size[1]} pixels" for one in results})
    notes = (
        f"float32, {', '.join(pictures)}; {here['cores']} CPU cores with a load of {here['load']:.1f};",
        f"{packages}.",
        "`train` is forward and backward, without the optimiser. images/s are of the least time. ratio is",
        "timm's least time over ours, quartiles those of the ratio of neighbouring turns, CPU ratio that of",
        "the work of all threads. Peak is of the process, compiling included.",
    )
    return "\n".join([table, "", *notes, ""])


def plot(results: Sequence[Result]) -> bytes:
    """Published accuracy over MACs and over the measured latency of a picture.

    Where no accuracy is known, latency over MACs. A filled dot is this library, a ring timm.
    """
    figure = Figure(figsize=(9.6, 3.8), dpi=140, layout="constrained")
    rated = [result for result in results if result.top1 is not None]
    if rated:
        left, right = figure.subplots(1, 2, sharey=True)
        _points(left, rated, lambda result, side: (result.macs / 1e9, result.top1), sides=("ours",))
        _points(right, rated, lambda result, side: (_latency(result, side), result.top1))
        left.set_ylabel("published top-1 (%)")
        right.set_xlabel("forward, ms a picture")
    else:
        left = figure.subplots()
        _points(left, results, lambda result, side: (result.macs / 1e9, _latency(result, side)))
        left.set_ylabel("forward, ms a picture")
    left.set_xlabel("GMACs")
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.margins(0.2)
    return png(figure)


def _points(
    axes: Axes,
    results: Sequence[Result],
    place: Callable[[Result, str], tuple[float | None, float | None]],
    sides: tuple[str, ...] = ("ours", "timm"),
) -> None:
    for number, result in enumerate(results):
        colour = COLOURS[number % len(COLOURS)]
        for side in sides:
            x, y = place(result, side)
            if x is None or y is None:
                continue
            face = colour if side == "ours" else "white"
            axes.plot(x, y, "o", color=colour, markerfacecolor=face, markersize=6, markeredgewidth=1.6)
            if side == "ours":
                name = Path(result.config).stem + result.config.partition(".py")[2]
                axes.annotate(name, (x, y), xytext=(6, 6), textcoords="offset points", fontsize=8)


def _latency(result: Result, side: str) -> float | None:
    timed = getattr(result.steps["forward"], side)
    return None if timed is None else 1e3 * min(timed.seconds) / result.batch
