"""Many runs of one config with other values of some keys: a grid, random points, or successive halving.

    grid, random                 every point is trained to the end
    halving by a factor f        all n points are trained for f^-r of the steps, r = floor(log_f n), the best
                                 n / f of them, anew, f times as long, and so on, the last ones to the end

A rung is trained anew, with a schedule as long as it is: what a run has half-way through a long schedule says
little of where it ends. Jamieson and Talwalkar, "Non-stochastic Best Arm Identification", AISTATS 2016.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table as Screen

from effjax.errors import RunError, UsageError
from effjax.experiment import resolve
from effjax.train.durations import parse as duration
from experiments import cli
from experiments.cli import LoadedConfig
from experiments.run.accelerating import larger_is_better, quality
from experiments.run.children import Job, run_all
from experiments.run.closing import print_table
from experiments.run.comparing import words
from experiments.run.files import naming, to_json, write_atomic
from experiments.run.formatting import measurement
from experiments.run.metrics import read
from experiments.run.plots import curve, swept
from experiments.run.report import Code, Figure, Report, Section, Table, render
from experiments.run.signals import StopFlag
from experiments.run.sweep_space import Axis, Point, points


@dataclasses.dataclass(frozen=True)
class Request:
    """What is tried, and how.

    Attributes:
      axes: the keys and their values.
      trials: points drawn at random; None tries all combinations.
      halving: factor by which points grow fewer and runs longer; None trains all to the end.
      metric: SPLIT/NAME of what says how good a run is; None takes that of the last evaluator.
      processes: runs at a time.
      seed: of the points that are drawn.
    """

    axes: tuple[Axis, ...]
    trials: int | None
    halving: int | None
    metric: str | None
    processes: int
    seed: int


@dataclasses.dataclass(frozen=True)
class Trial:
    """One point, trained for a share of the steps.

    Attributes:
      number: of the point, from 1.
      point: its values.
      rung: from 0.
      share: of the steps of the config.
    """

    number: int
    point: Point
    rung: int
    share: Fraction

    def folder(self, out: Path) -> Path:
        """Where it lives: `trials/003_optimizer.lr=0.01/1_of_9`, by the share and not by the rung, as another
        halving has other ones."""
        said = " ".join(f"{key}={value}" for key, value in self.point)
        return (
            out
            / "trials"
            / f"{self.number:03d}_{words(said)}"[:120]
            / f"{self.share.numerator}_of_{self.share.denominator}"
        )


def run(loaded: LoadedConfig, request: Request, out: str, stop: StopFlag) -> int:
    """Trains what is not there yet, rung after rung, and reports; returns the exit code.

    Raises:
      UsageError: for a config without evaluators, or a sweep that cannot be, before anything is trained.
      Preempted: where SIGTERM arrived; what is complete stays.
      RunError: where points failed; the others are in the table.
    """
    if not resolve(loaded.config).evaluators:
        raise UsageError(f"{loaded.name} has no evaluators, so nothing says how good it is.")
    left = list(enumerate(points(request.axes, request.trials, request.seed), 1))
    sweep = _Sweep(loaded, request, Path(out), stop)
    shares = rungs(len(left), request.halving)
    for rung, share in enumerate(shares):
        found = sweep.trained([Trial(number, point, rung, share) for number, point in left])
        best = sorted(found, key=lambda trial: sweep.order(found[trial]))
        count = math.ceil(len(left) / (request.halving or 1))
        left = [(trial.number, trial.point) for trial in best[:count]]
    sweep.write()
    if sweep.failed:
        reasons = "; ".join(f"{trial.number}: {reason}" for trial, reason in sweep.failed.items())
        raise RunError(f"{len(sweep.failed)} runs failed, the table holds the others. {reasons}")
    return 0


def rungs(count: int, halving: int | None) -> list[Fraction]:
    """The share of the steps of each rung, the last one all of them.

    Raises:
      UsageError: for a factor that leaves as many as there were.
    """
    if halving is None:
        return [Fraction(1)]
    if halving < 2:
        raise UsageError(f"--halving={halving}: give the factor by which runs grow longer, 2 or more.")
    last = 0
    while halving ** (last + 1) <= count:
        last += 1
    return [Fraction(1, halving ** (last - rung)) for rung in range(last + 1)]


def shortened(steps: str, share: Fraction) -> str:
    """A share of a duration, of steps at least one: `"30 epochs"` of a third is `"10 epochs"`."""
    whole = duration(steps)
    amount = whole.amount * share
    if whole.unit in ("steps", "examples"):
        return f"{math.ceil(amount)} {whole.unit}"
    return f"{float(amount):.6f}".rstrip("0").rstrip(".") + f" {whole.unit}"


class _Sweep:
    """What has been found so far."""

    def __init__(self, loaded: LoadedConfig, request: Request, out: Path, stop: StopFlag) -> None:
        self.loaded, self.request, self.out, self.stop = loaded, request, out, stop
        self.found: dict[Trial, dict[str, Any]] = {}
        self.failed: dict[Trial, str] = {}
        self.console = Console(highlight=False)

    def trained(self, trials: Sequence[Trial]) -> dict[Trial, dict[str, Any]]:
        """The results of a rung, of those that did not fail.

        Raises:
          UsageError: where the config refuses the values.
          RunError: where all of them failed.
        """
        jobs = {}
        for trial in trials:
            job, note = self._job(trial), trial.folder(self.out) / "result.json"
            noted = json.loads(note.read_text()) if note.is_file() else {}
            if noted.get("arguments") == list(job.arguments):
                self.found[trial] = self._chosen(noted)
            else:  # none yet, or that of another config
                jobs[job] = trial

        def ended(job: Job, code: int, said: str) -> None:
            trial = jobs[job]
            if code == UsageError.exit_code:
                raise UsageError(f"{_values(trial.point)}: {said}")
            if code:
                self.failed[trial] = said
            else:
                self.found[trial] = self._chosen(self._result(trial, job))
            if not self.console.is_terminal:
                self.console.print(self._line(trial), soft_wrap=True)

        screen = Live(console=self.console, auto_refresh=False)
        with screen if self.console.is_terminal else contextlib.nullcontext():

            def looked(running: tuple[Job, ...]) -> None:
                if self.console.is_terminal:
                    screen.update(self._screen(trials, {jobs[job] for job in running}), refresh=True)

            run_all(jobs, self.request.processes, self.stop, ended, looked)
            looked(())
        found = {trial: self.found[trial] for trial in trials if trial in self.found}
        if not found:
            reason = next(iter(self.failed.values()), "")
            raise RunError(f"all {len(trials)} runs failed; the first one said: {reason}")
        return found

    def order(self, result: Mapping[str, Any]) -> float:
        """Less is better; what is no number comes last."""
        value = float(result["value"])
        signed = -value if larger_is_better(result["metric"].rpartition("/")[2]) else value
        return math.inf if math.isnan(signed) else signed

    def _job(self, trial: Trial) -> Job:
        folder = trial.folder(self.out)
        given = {**self.loaded.overrides, **dict(trial.point)}
        given["train.steps"] = shortened(
            given.get("train.steps", self.loaded.config.train.steps), trial.share
        )
        flags = tuple(f"--config.{key}={value}" for key, value in given.items())
        arguments = (f"--config={self.loaded.name}", f"--workdir={folder / 'run'}", *flags)
        return Job("experiments.train", arguments, folder / "train.log")

    def _result(self, trial: Trial, job: Job) -> dict[str, Any]:
        """What the run reached at its end, which is noted: the trial is complete then."""
        folder = trial.folder(self.out)
        measured = [row for row in read(folder / "run" / "metrics.jsonl") if row["split"] != "train"]
        last = {row["split"]: row for row in measured}
        every = {
            f"{split}/{name}": value
            for split, row in last.items()
            for name, value in row.items()
            if name not in ("step", "split")
        }
        if not every:
            raise RunError(f"{folder / 'run'} was trained and never evaluated.")
        result = {
            "arguments": list(job.arguments),
            "point": dict(trial.point),
            "split": measured[-1]["split"],
            "metrics": every,
        }
        with naming(folder):
            write_atomic(folder / "result.json", to_json(result, indent=2) + "\n")
        return result

    def _chosen(self, result: dict[str, Any]) -> dict[str, Any]:
        """The same with what it is judged by.

        Raises:
          UsageError: where the metric that was asked for is not there.
        """
        every, split = result["metrics"], result["split"] + "/"
        own = {name.removeprefix(split): value for name, value in every.items() if name.startswith(split)}
        metric = self.request.metric or split + quality(own)
        if metric not in every:
            raise UsageError(f"--metric={metric} is none of {', '.join(every)}.")
        return {**result, "metric": metric, "value": every[metric]}

    def _line(self, trial: Trial) -> str:
        if trial in self.failed:
            return f"{trial.number:03d}  {_values(trial.point)}  failed: {self.failed[trial]}"
        result = self.found[trial]
        return (
            f"{trial.number:03d}  {_values(trial.point)}  {result['metric']} {measurement(result['value'])}"
        )

    def _screen(self, trials: Sequence[Trial], running: set[Trial]) -> Screen:
        """The live table of a rung, best first."""
        table = Screen(box=None, pad_edge=False, title=f"rung {trials[0].rung}, {float(trials[0].share):.0%}")
        for heading in ("trial", *(axis.key for axis in self.request.axes), "state", "value"):
            table.add_column(heading)
        done = sorted((t for t in trials if t in self.found), key=lambda t: self.order(self.found[t]))
        for trial in [*done, *(t for t in trials if t not in self.found)]:
            state = "running" if trial in running else "failed" if trial in self.failed else "waits"
            value = ""
            if trial in self.found:
                state, value = "done", measurement(self.found[trial]["value"])
            table.add_row(str(trial.number), *(value for _, value in trial.point), state, value)
        return table

    def write(self) -> None:
        """The table, the plots and the report, best first; those that went furthest before the others."""
        best = sorted(self.found, key=lambda trial: (-trial.rung, self.order(self.found[trial])))
        metric = self.found[best[0]]["metric"]
        keys = [axis.key for axis in self.request.axes]
        headings = ("trial", *keys, "steps", metric)
        rows = [
            (
                str(trial.number),
                *(value for _, value in trial.point),
                f"{float(trial.share):.0%}",
                measurement(self.found[trial]["value"]),
            )
            for trial in best
        ]
        print_table(str(self.out), headings, rows)
        figures = self._figures(best, metric)
        for name, figure in figures.items():
            write_atomic(self.out / f"{words(name)}.png", figure)
        lines = ["| " + " | ".join(row) + " |" for row in (headings, ("---",) * len(headings), *rows)]
        write_atomic(self.out / "sweep.md", "\n".join(lines) + "\n")
        said = [
            {"trial": trial.number, "rung": trial.rung, "share": float(trial.share), **self.found[trial]}
            for trial in best
        ]
        write_atomic(self.out / "sweep.json", to_json(said, indent=2) + "\n")
        flags = " ".join(f"--config.{key}={value}" for key, value in best[0].point)
        again = f"python -m experiments.train --config={self.loaded.name} --workdir=runs/best {flags}"
        sections = [
            Section("Table", [Table(headings, rows)]),
            Section("Plots", [Figure(png, name, plot=True) for name, png in figures.items()]),
            Section("The best one", [Code(again)]),
            Section("To run it again", [Code(cli.command_line())]),
        ]
        summary = {"runs": str(len(self.found)), f"best {metric}": rows[0][-1]}
        write_atomic(
            self.out / "report.html", render(Report(f"Sweep of {self.loaded.name}", summary, sections))
        )
        print(f"best      {_values(best[0].point)}")
        print(f"report    {self.out / 'report.html'}")

    def _figures(self, best: Sequence[Trial], metric: str) -> dict[str, bytes]:
        """The metric over every key, of all runs to the end, and over the steps, of the ten best."""
        last = [trial for trial in best if trial.rung == best[0].rung]
        values = [float(self.found[trial]["value"]) for trial in last]
        figures = {
            f"{metric} over {axis.key}": swept(
                [dict(trial.point)[axis.key] for trial in last],
                values,
                axis.key,
                metric,
                log=axis.range == "log",
            )
            for axis in self.request.axes
        }
        split, _, name = metric.partition("/")
        rows = [
            {**row, "split": f"{trial.number}"}
            for trial in last[:10]
            for row in read(trial.folder(self.out) / "run" / "metrics.jsonl")
            if row["split"] == split
        ]
        return {**figures, f"{metric} over steps": curve(rows, name)}


def _values(point: Point) -> str:
    return " ".join(f"{key}={value}" for key, value in point)
