"""A training run from start to report: the library's loop, with files, progress and signals around it."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from effjax.errors import Preempted, RunError, UsageError
from effjax.experiment import resolve
from effjax.matching import match
from effjax.parallel.sharding import activate, readers, to_global
from effjax.train.checkpoint import Checkpoints
from effjax.train.loop import Observer, Outcome, fit
from effjax.train.nonfinite import Diagnosis
from effjax.train.program import Program, build_program, check_trainable
from effjax.train.state import TrainState
from effjax.train.tasks import served
from experiments import cli
from experiments.run import goodput, processes, replay
from experiments.run.closing import closing_table
from experiments.run.cost import cost_of
from experiments.run.formatting import count, duration, measurement
from experiments.run.goodput import GoodputLog
from experiments.run.metrics import MetricsWriter
from experiments.run.progress import Progress
from experiments.run.restore import read_weights, stored_as_started
from experiments.run.run_report import curves_of, of_run, write_plots, write_report
from experiments.run.signals import StopFlag
from experiments.run.watchdog import Watchdog
from experiments.run.workdir import Workdir

# What may differ when a run goes on: none of these changes what is computed.
RESUMABLE = ("config.mesh", "config.sharding", "config.train.log_every", "config.train.checkpoint_every",
             "config.train.keep", "config.data.threads", "config.data.prefetch")  # fmt: skip


def run(loaded: cli.LoadedConfig, workdir: str, *, stop: StopFlag, profile_steps: int = 0) -> int:
    """Trains to the end of the config's budget; returns the exit code.

    Raises:
      UsageError: for a config or workdir that cannot be used; before anything is compiled.
      Preempted: where SIGTERM arrived; the state is saved.
      RunError: for a number that is not finite, a full disk, too many broken records.
    """
    began = time.monotonic()
    config = stored_as_started(loaded.config)
    processes.agree({"config": config.to_dict(), "workdir": workdir})
    together = processes.Together(stop)
    experiment = resolve(config)
    data = experiment.data.open()
    program = build_program(experiment, data)
    check_trainable(program.shapes.params)
    with contextlib.ExitStack() as opened:
        path = Path(processes.by_first(lambda: str(_folder(opened, program, workdir, config, loaded.name))))
        processes.shared(str(path))
        with (
            contextlib.closing(Checkpoints(path / "checkpoints", keep=experiment.train.keep)) as saved,
            contextlib.ExitStack() as stack,
        ):
            state = _start(program, saved, together)
            dog = stack.enter_context(Watchdog())
            observer: Observer = Silent(dog)
            if processes.first():
                writer = stack.enter_context(MetricsWriter(path, restored_step=int(state.step)))
                progress = stack.enter_context(_progress(program, state))
                log = GoodputLog(path, int(state.step), time.monotonic() - began)
                observer = RunObserver(path, writer, progress, log, dog)
                stack.enter_context(_profile(path, observer, profile_steps))
            outcome = fit(
                program,
                state,
                checkpoints=saved,
                observer=observer,
                stop_requested=together.requested,
                read=read_weights,
            )
        return _finish(path, program, outcome, data.bad_records)


def _folder(
    opened: contextlib.ExitStack, program: Program, workdir: str, config: ConfigDict, config_file: str
) -> Path:
    """The folder of the run, which is ours as long as the stack is open."""
    devices = [f"{d.platform}:{d.device_kind}" for d in program.mesh.devices.flat]
    folder = Workdir.create_or_resume(
        workdir,
        config,
        command=cli.command_line(),
        config_file=config_file,
        devices=devices,
        allowed=RESUMABLE,
    )
    return opened.enter_context(folder).path


def _start(program: Program, checkpoints: Checkpoints, stop: processes.Together) -> TrainState:
    """The newest sound checkpoint, or the state before the first step."""
    if stop.requested():
        raise Preempted("told to stop before the first step. Run the same command again to start.")
    if not checkpoints.steps():
        return first_state(program)
    restored = checkpoints.restore(program.shapes)
    if processes.first():
        print(f"resuming at step {restored.step}", flush=True)
    # A run that halted on a bad number tries the step again: the cause may have been mended meanwhile.
    return restored.state.replace(halted=jax.numpy.zeros_like(restored.state.halted))


def first_state(program: Program) -> TrainState:
    """The state before the first step: fresh, or from weights where the config names a folder.

    Where only a frozen part of the task comes from a folder, the model begins with what it inherits of it.

    Raises:
      UsageError: where the weights are not those of the config's model, naming every path that differs, or
        the data are not what the task can learn from.
    """
    task, train = program.task, program.experiment.train
    given = {}
    if train.start is not None:
        shapes = served(task, {"params": program.shapes.params, **program.shapes.collections})
        shapes["params"] = _without(shapes["params"], train.fresh)
        shapes = {name: leaf for name, leaf in shapes.items() if name not in getattr(task, "measured", ())}
        given = read_weights(train.start, shapes, "config.model")
    for name, folder in getattr(task, "frozen", {}).items():
        if folder is None:
            raise UsageError(f"config.task.weights is missing: the folder with the weights of the {name}.")
        given[name] = read_weights(folder, program.shapes.collections[name], f"config.task.{name}")
    if train.start is None and hasattr(task, "inherit"):
        given["params"] = task.inherit(program.shapes.params, given, lambda: _rows(program))
    if hasattr(task, "measure"):
        given |= task.measure(given, lambda: _rows(program))
    state = program.init(given or None)
    if hasattr(task, "check"):
        with activate(program.mesh, program.rules):
            task.check(program.variables(state, ema=False), next(_rows(program)))
    return state


def _rows(program: Program) -> Iterator[Any]:
    """Batches of training data, from the first."""
    rows = program.data.train(**readers(program.batch_sharding))
    return (to_global(row, program.batch_sharding) for row in rows)


def _without(params: Any, fresh: tuple[str, ...]) -> Any:
    """The parameters that are not to be drawn."""
    drawn = match([(pattern, True) for pattern in fresh], params, default=False, where="config.train.fresh")
    leaves, out = flatten_dict(params), flatten_dict(drawn)
    # What is stored otherwise is one parameter, of several leaves.
    return unflatten_dict(
        {path: leaf for path, leaf in leaves.items() if not any(jax.tree.leaves(out[path]))}
    )


def _progress(program: Program, state: TrainState) -> Progress:
    data = program.experiment.data
    tokens = data.packing.length if data.packing else 1
    return Progress(
        program.budget.total_steps,
        start=int(state.step),
        units_per_step=data.batch_size * tokens,
        unit=program.task.unit,
    )


@dataclasses.dataclass
class RunObserver:
    """Writes what the loop says to the files of the run and the terminal."""

    path: Path
    writer: MetricsWriter
    progress_line: Progress
    goodput: GoodputLog
    watchdog: Watchdog
    on_step: Any = None

    def progress(self, step: int, total: int, values: Mapping[str, float]) -> None:
        """Moves the progress line."""
        self.watchdog.beat()
        self.progress_line.update(step, values)
        if self.on_step is not None:
            self.on_step(step)

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Appends to the metric files; evaluations are shown too."""
        self.writer.write(step, split, values)
        if split != "train":
            shown = "  ".join(f"{name} {measurement(value)}" for name, value in values.items())
            self.say(f"step {step}  {split}: {shown}")

    def say(self, message: str) -> None:
        """Shows a line of its own."""
        self.progress_line.message(message)

    @contextlib.contextmanager
    def pause(self, label: str) -> Iterator[None]:
        """Names what the loop does between steps."""
        with self.watchdog.pause(), self.progress_line.pause(label):
            yield

    def spent(self, step: int, seconds: dict[str, float]) -> None:
        """Appends to the record of where the time went."""
        self.goodput.write(step, seconds)

    def evidence(self, diagnosis: Diagnosis, batch: Mapping[str, np.ndarray]) -> str:
        """Keeps the bad step under `replay/`; returns the command that repeats it."""
        return replay.keep(self.path, diagnosis, batch)


@dataclasses.dataclass
class Silent:
    """What the processes behind the first one tell: nothing, as it tells the same."""

    watchdog: Watchdog

    def progress(self, step: int, total: int, values: Mapping[str, float]) -> None:
        """Says nothing."""
        self.watchdog.beat()

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Writes nothing."""

    def say(self, message: str) -> None:
        """Says nothing."""

    def pause(self, label: str) -> contextlib.AbstractContextManager[None]:
        """Shows nothing."""
        return self.watchdog.pause()

    def spent(self, step: int, seconds: dict[str, float]) -> None:
        """Says nothing."""

    def evidence(self, diagnosis: Diagnosis, batch: Mapping[str, np.ndarray]) -> str:
        """Keeps nothing."""
        return "see the first process"


@contextlib.contextmanager
def _profile(path: Path, observer: RunObserver, steps: int) -> Iterator[None]:
    """Traces some steps for TensorBoard's profiler, once the first ones have warmed up."""
    if steps <= 0:
        yield
        return
    seen, running = 0, False

    def on_step(step: int) -> None:
        nonlocal seen, running
        seen += 1
        if seen == 10:
            jax.profiler.start_trace(str(path / "profile"))
            running = True
        elif running and seen == 10 + steps:
            jax.profiler.stop_trace()
            running = False
            observer.say(f"profile of {steps} steps: {path / 'profile'}")

    observer.on_step = on_step
    try:
        yield
    finally:
        if running:
            jax.profiler.stop_trace()


def _finish(path: Path, program: Program, outcome: Outcome, bad_records: Mapping[int, str]) -> int:
    """Plots, report and closing table; 1 where an evaluator failed."""
    if processes.first():
        _write_report(path, program, outcome, bad_records)
    if outcome.failures:
        raise RunError(f"training is complete, but evaluators failed: {', '.join(outcome.failures)}.")
    return 0


def _write_report(path: Path, program: Program, outcome: Outcome, bad_records: Mapping[int, str]) -> None:
    cost = cost_of(program)
    summary = {"parameters": count(cost.parameters), "MACs": f"{count(cost.macs)} an example"}
    for name, values in outcome.evaluations.items():
        summary |= {f"{name} {metric}": measurement(value) for metric, value in values.items()}
    if np.isfinite(outcome.step_seconds):
        summary["step time"] = duration(outcome.step_seconds)
    spent = goodput.read(path)
    if spent is not None:
        summary["goodput"] = f"{spent.share:.1%}"
    notes = [f"Evaluator {name!r} failed: {reason}" for name, reason in outcome.failures.items()]
    if bad_records:
        notes.append(f"unreadable records replaced by the next readable one: {len(bad_records)}")
    curves = curves_of(path)
    write_plots(path, curves)
    title = f"{type(program.experiment.model).__name__}, {type(program.task).__name__.lower()}"
    report = of_run(
        path,
        title=title,
        summary=summary,
        curves=curves,
        cost_columns=cost.columns,
        cost=cost.rows,
        notes=notes,
    )
    where = write_report(path, report)
    closing_table(title, summary | {"report": str(where)})
    for note in notes:
        print(note)
