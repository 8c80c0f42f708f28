"""The report of a training run, put together from what its folder holds."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.run import goodput, metrics
from experiments.run.files import naming, write_atomic
from experiments.run.plots import curve, curve_names
from experiments.run.report import Code, Figure, Report, Section, Table, Text, render


@dataclass(frozen=True)
class CostRow:
    """One line of the cost tree.

    Attributes:
      name: the module.
      depth: how many modules contain it.
      cells: what it costs, under the headings given with the rows.
    """

    name: str
    depth: int
    cells: Sequence[Any]


def of_run(
    workdir: str | os.PathLike[str],
    *,
    title: str,
    summary: Mapping[str, str],
    curves: Mapping[str, Figure],
    baselines: Mapping[str, Mapping[str, str]] | None = None,
    cost_columns: Sequence[str] = (),
    cost: Sequence[CostRow] = (),
    samples: Sequence[Figure] = (),
    notes: Sequence[str] = (),
) -> Report:
    """Reads a run folder and returns its report.

    Args:
      workdir: holds `config.json` and `environment.json`.
      title: the run in a few words.
      summary: the headline: family, parameters, MACs, step time, final metrics.
      curves: every metric over steps, see `curves_of`.
      baselines: other systems by name, with the values of the summary's names that are known of them.
      cost_columns: the headings of `cost` after the name: parameters, MACs.
      cost: the cost tree, parents before children.
      samples: pictures that the model made or was asked about.
      notes: sentences to stand first: a metric that failed, records that were skipped.

    Raises:
      RunError: if a file of the folder cannot be read.
    """
    workdir = Path(workdir)
    record = _read_json(workdir / "config.json")
    sections = []
    if notes:
        sections.append(Section("Notes", [Text(note) for note in notes]))
    if baselines:
        sections.append(Section("Compared with", [_comparison(title, summary, baselines)]))
    if curves:
        sections.append(Section("Curves", list(curves.values())))
    if samples:
        sections.append(Section("Samples", samples))
    if cost:
        columns = ("module", *cost_columns)
        cells = [(row.name, *row.cells) for row in cost]
        sections.append(Section("Cost", [Table(columns, cells, [row.depth for row in cost])]))
    spent = goodput.read(workdir)
    if spent is not None:
        sections.append(goodput.section(spent))
    environment = _read_json(workdir / "environment.json")
    sections += [
        Section("To run it again", [Code(record["command"])]),
        Section("Config", [Table(("key", "value"), list(_flat(record["config"], "config")))], folded=True),
        Section("Environment", [Table(("what", "value"), _environment_rows(environment))], folded=True),
    ]
    return Report(title, summary, sections, subtitle=record["config_file"])


def curves_of(workdir: str | os.PathLike[str]) -> dict[str, Figure]:
    """Draws every metric of a run, by name; none where nothing was measured."""
    path = Path(workdir) / metrics.FILE_NAME
    rows = metrics.read(path) if path.exists() else []
    return {name: _curve_figure(rows, name) for name in curve_names(rows)}


def write_plots(workdir: str | os.PathLike[str], curves: Mapping[str, Figure]) -> list[Path]:
    """Writes every curve to `plots/NAME.png`; returns the files."""
    files = []
    for name, figure in curves.items():
        files.append(Path(workdir) / "plots" / f"{name.replace('/', '_')}.png")
        write_atomic(files[-1], figure.png)
    return files


def write_report(workdir: str | os.PathLike[str], report: Report) -> Path:
    """Writes `report.html`; returns where it lies."""
    path = Path(workdir) / "report.html"
    write_atomic(path, render(report))
    return path


def _comparison(title: str, summary: Mapping[str, str], baselines: Mapping[str, Mapping[str, str]]) -> Table:
    known = [name for name in summary if any(name in values for values in baselines.values())]
    systems = {title: summary, **baselines}
    return Table(
        ("system", *known),
        [(name, *(values.get(key, "") for key in known)) for name, values in systems.items()],
    )


def _curve_figure(rows: Sequence[Mapping[str, Any]], name: str) -> Figure:
    having = [row for row in rows if name in row]
    ends = {row["split"]: row[name] for row in having}
    described = ", ".join(f"{split} ends at {value:.4g}" for split, value in ends.items())
    return Figure(curve(having, name), alt=f"Curve of {name} over steps: {described}.", plot=True)


def _flat(value: Any, path: str) -> Sequence[tuple[str, str]]:
    """Every leaf with its full key, as it is typed on the command line."""
    if isinstance(value, Mapping) and value:
        return [row for key in value for row in _flat(value[key], f"{path}.{key}")]
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        return [row for index, item in enumerate(value) for row in _flat(item, f"{path}[{index}]")]
    return [(path, json.dumps(value))]


def _environment_rows(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for name, value in environment.items():
        if name == "versions":
            rows += [(package, version or "not installed") for package, version in value.items()]
        elif name == "earlier":
            rows.append(("earlier starts", ", ".join(start["date"] for start in value) or "none"))
        elif name == "devices":
            rows.append((name, ", ".join(value) or "not recorded"))
        elif name != "command":
            rows.append((name, "unknown" if value is None else str(value)))
    return rows


def _read_json(path: Path) -> dict[str, Any]:
    with naming(path):
        return json.loads(path.read_text())
