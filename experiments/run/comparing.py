"""Many configs and methods, one table: each trained and measured in processes of its own."""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from effjax.errors import RunError, UsageError
from effjax.experiment import resolve
from experiments import cli
from experiments.cli import LoadedConfig
from experiments.run.accelerating import WHOLE, Measured, larger_is_better, quality, read, text_rows
from experiments.run.children import Job, run_all
from experiments.run.closing import print_table
from experiments.run.files import naming, to_json, write_atomic
from experiments.run.plots import pareto
from experiments.run.recipe_spec import AskedRecipe
from experiments.run.report import Code, Figure, Report, Section, Table, render
from experiments.run.signals import StopFlag

AXES = {"macs": "MACs of an example", "seconds": "milliseconds of an example"}


@dataclasses.dataclass(frozen=True)
class Request:
    """How every run is measured.

    Attributes:
      methods: as typed.
      recipes: that make every run smaller.
      batch: examples a timed batch, or None.
      rounds: of the timings.
    """

    methods: tuple[str, ...]
    recipes: tuple[AskedRecipe, ...]
    batch: int | None
    rounds: int


def run(configs: Sequence[LoadedConfig], request: Request, out: str, stop: StopFlag) -> int:
    """Trains and measures what is not there yet, then writes the table; returns the exit code.

    Raises:
      UsageError: for a config without evaluators, before anything is trained.
      Preempted: where SIGTERM arrived; what is complete stays.
      RunError: where a config failed; the others are complete and in the table.
    """
    for loaded in configs:
        if not resolve(loaded.config).evaluators:
            raise UsageError(f"{loaded.name} has no evaluators, so nothing says how good it is.")
    folder = Path(out)
    failed, found = {}, {}
    for number, loaded in enumerate(configs, 1):
        print(f"[{number}/{len(configs)}] {loaded.name}", flush=True)
        try:
            found[loaded.name] = _measured(loaded, request, folder / "runs" / _slug(loaded), stop)
        except RunError as error:
            failed[loaded.name] = str(error)
    if found:
        _write(folder, found)
    if failed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise RunError(f"{len(failed)} of {len(configs)} failed, the table holds the others. {reasons}")
    return 0


def _slug(loaded: LoadedConfig) -> str:
    """A folder's name: `vision_vit_digits`, with the overrides behind it."""
    said = [loaded.name.removeprefix("configs/").replace(".py", "")]
    said += [f"{key}={value}" for key, value in sorted(loaded.overrides.items())]
    return words(" ".join(said))


def words(said: str) -> str:
    """The same as the name of a file."""
    return re.sub(r"[^A-Za-z0-9.=-]+", "_", said)


def _measured(loaded: LoadedConfig, request: Request, folder: Path, stop: StopFlag) -> list[Measured]:
    """Trains one config, measures it and makes it smaller, where that is not done."""
    workdir, results = folder / "run", folder / "compare"
    asked: dict[str, Any] = {
        "batch": request.batch,
        "rounds": request.rounds,
        "methods": list(request.methods),
    }
    asked |= {"workdir": str(workdir), "out": str(results)}
    note = results / "request.json"
    if note.is_file() and (results / "table.json").is_file() and json.loads(note.read_text()) == asked:
        print("  complete", flush=True)
    else:
        overrides = [f"--config.{key}={value}" for key, value in loaded.overrides.items()]
        train = ("experiments.train", f"--config={loaded.name}", f"--workdir={workdir}", *overrides)
        _child(folder / "train.log", stop, *train)
        _measure(note, asked, stop)
    smaller = [_smaller(workdir, recipe, request.rounds, folder, stop) for recipe in request.recipes]
    return [*read(results), *smaller]


def _measure(note: Path, asked: dict[str, Any], stop: StopFlag) -> None:
    """The run as it is, and with every method."""
    results = note.parent
    with naming(results):
        results.mkdir(parents=True, exist_ok=True)
    (results / "table.json").unlink(missing_ok=True)
    write_atomic(note, to_json(asked))
    _child(results.parent / "compare.log", stop, "experiments.run.compare_worker", str(note))


def _smaller(workdir: Path, recipe: AskedRecipe, rounds: int, folder: Path, stop: StopFlag) -> Measured:
    """What a recipe leaves of the run, where that is not done."""
    name = words(recipe.label.removeprefix("configs/").replace(".py", ""))
    out = folder / "smaller" / name
    if (out / "table.json").is_file():
        print(f"  {name} is complete", flush=True)
    else:
        flags = (f"--workdir={workdir}", f"--out={out}", f"--rounds={rounds}", *recipe.arguments)
        _child(folder / f"{name}.log", stop, "experiments.compress", *flags)
    *_, made = read(out)
    return dataclasses.replace(made, label=recipe.label)


def _child(log: Path, stop: StopFlag, module: str, *arguments: str) -> None:
    """Runs a program to its end, its words in a file; hands a SIGTERM on.

    Raises:
      Preempted: where this process or the other was told to stop.
      RunError: where the other failed, with its last line.
    """
    print(f"  {module.rpartition('.')[2]}, see {log}", flush=True)
    failures: list[str] = []
    run_all(
        [Job(module, arguments, log)], 1, stop, lambda _, code, said: failures.extend([said] * bool(code))
    )
    if failures:
        raise RunError(failures[0])


def _write(folder: Path, found: dict[str, list[Measured]]) -> None:
    """The table, the plots and the report."""
    rows = {
        config if row.label == WHOLE else f"{config} {row.label}": row
        for config, measured in found.items()
        for row in measured
    }
    headings, cells = _table(rows)
    print_table(str(folder), headings, cells)
    metrics = {quality(row.metrics) for row in rows.values()}
    figures = {
        f"{metric}_{axis}.png": _plot(rows, metric, axis) for metric in sorted(metrics) for axis in AXES
    }
    for name, figure in figures.items():
        write_atomic(folder / name, figure)
    lines = ["| " + " | ".join(row) + " |" for row in (headings, ("---",) * len(headings), *cells)]
    write_atomic(folder / "compare.md", "\n".join(lines) + "\n")
    said = {name: dataclasses.asdict(row) for name, row in rows.items()}
    write_atomic(folder / "compare.json", to_json(said, indent=2) + "\n")
    shown = [
        Figure(png, name.removesuffix(".png").replace("_", " against "), plot=True)
        for name, png in figures.items()
    ]
    sections = [
        Section("Table", [Table(headings, cells)]),
        Section("Fronts", shown),
        Section("To run it again", [Code(cli.command_line())]),
    ]
    page = Report("Compared", {"configs": str(len(found)), "rows": str(len(rows))}, sections)
    write_atomic(folder / "report.html", render(page))
    print(f"report    {folder / 'report.html'}")


def _table(rows: dict[str, Measured]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """One row a model; a metric that a config does not have is a dash."""
    metrics = list(dict.fromkeys(name for row in rows.values() for name in row.metrics))
    every: list[tuple[str, ...]] = []
    headings: tuple[str, ...] = ()
    for name, row in rows.items():
        one, (cells,) = text_rows([row])
        by_heading: dict[str, Any] = dict(zip(one, cells, strict=True))
        others = [
            heading for heading in one if heading not in row.metrics and heading not in ("method", "of full")
        ]
        headings = ("model", *metrics, *others)
        every.append(
            (name, *(by_heading.get(metric, "-") for metric in metrics), *(by_heading[o] for o in others))
        )
    return headings, every


def _plot(rows: dict[str, Measured], metric: str, axis: str) -> bytes:
    """Quality over cost of one example, of all models that have this metric."""
    points = {}
    for name, row in rows.items():
        if quality(row.metrics) == metric:
            cost = float(row.macs) if axis == "macs" else 1e3 * row.seconds / row.batch
            points[name.removeprefix("configs/").replace(".py", "")] = (cost, row.metrics[metric])
    return pareto(points, AXES[axis], metric, larger_is_better=larger_is_better(metric))
