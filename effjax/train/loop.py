"""The training loop: one for every family. It knows a program, a stream of batches and whom to tell.

    restore or init -> [ batch -> step -> now and then: log, evaluate, save ] -> last evaluation, last save

It reads no clock to decide anything: what happens at a step follows from the step's number, so an
interrupted run that is resumed does what the unbroken one would have done. All output goes through an
`Observer`; the disk is touched by the checkpoints alone.
"""

import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from effjax.errors import EffjaxError, Preempted, RunError
from effjax.parallel.sharding import readers, to_global, to_host
from effjax.train.evaluators.evaluation import ReadWeights
from effjax.train.goodput import WallTime
from effjax.train.nonfinite import Diagnosis, diagnose
from effjax.train.program import Program
from effjax.train.state import TrainState, examples_seen


@runtime_checkable
class Observer(Protocol):
    """Whom the loop tells; the drivers write files and draw progress, tests collect."""

    def progress(self, step: int, total: int, values: Mapping[str, float]) -> None:
        """Called after every step with whatever is known without waiting for the device."""

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Called with the metrics of a split."""

    def say(self, message: str) -> None:
        """Called with a sentence for the user."""

    def pause(self, label: str) -> contextlib.AbstractContextManager[None]:
        """Entered while the loop does something else than steps."""

    def spent(self, step: int, seconds: dict[str, float]) -> None:
        """Called with what the loop has spent so far, by kind."""

    def evidence(self, diagnosis: Diagnosis, batch: Mapping[str, np.ndarray]) -> str:
        """Keeps what a replay of a bad step needs; returns the command that replays it."""


@runtime_checkable
class Checkpoints(Protocol):
    """What the loop asks of `effjax.train.checkpoint`."""

    def save(self, step: int, state: TrainState, extra: dict[str, Any]) -> None:
        """Starts saving a step."""

    def wait(self) -> None:
        """Blocks until all saves are on disk."""


@dataclasses.dataclass
class Outcome:
    """What a run came to.

    Attributes:
      state: the last state.
      evaluations: the newest values of each evaluator.
      failures: evaluators that failed, with the reason.
      step_seconds: median time of a step, compilation and pauses left out.
    """

    state: TrainState
    evaluations: dict[str, dict[str, float]]
    failures: dict[str, str]
    step_seconds: float


class _Clock:
    """Times steps from one hand-over of finished metrics to the next, leaving pauses out."""

    def __init__(self) -> None:
        self._durations: list[float] = []
        self._last: float | None = None

    def tick(self) -> None:
        now = time.perf_counter()
        if self._last is not None:
            self._durations.append(now - self._last)
        self._last = now

    def pause(self) -> None:
        self._last = None

    def median(self, newest: int = 0) -> float:
        durations = self._durations[-newest:] if newest else self._durations
        return float(np.median(durations)) if durations else float("nan")


def fit(
    program: Program,
    state: TrainState,
    *,
    checkpoints: Checkpoints,
    observer: Observer,
    stop_requested: Callable[[], bool],
    read: ReadWeights,
) -> Outcome:
    """Trains from `state` to the end of the budget; `read` gives evaluators the weights they need.

    Raises:
      Preempted: after saving, where `stop_requested` turned true.
      RunError: where a loss or gradient is not finite; the last good state is saved and the evidence kept.
    """
    return _Loop(program, checkpoints, observer, stop_requested, read).run(state)


class _Loop:
    """The loop's own bookkeeping; what it computes with is the program's."""

    def __init__(
        self,
        program: Program,
        checkpoints: Checkpoints,
        observer: Observer,
        stop_requested: Callable[[], bool],
        read: ReadWeights,
    ) -> None:
        self.program, self.checkpoints, self.observer = program, checkpoints, observer
        self.stop_requested = stop_requested
        budget, experiment = program.budget, program.experiment
        self.log_every = budget.steps(experiment.train.log_every)
        self.save_every = budget.steps(experiment.train.checkpoint_every)
        self.evaluate_every = {name: budget.steps(e.every) for name, e in experiment.evaluators.items()}
        # Opened now, so that a missing data set stops the run before it compiles.
        self.evaluators = {name: e.open(read) for name, e in experiment.evaluators.items()}
        # Compiled: by itself each operation of a schedule would be a program.
        self.learning_rate = jax.jit(program.learning_rate)
        self.clock = _Clock()
        self.wall = WallTime()
        self.evaluations: dict[str, dict[str, float]] = {}
        self.failures: dict[str, str] = {}

    def run(self, state: TrainState) -> Outcome:
        total = self.program.budget.total_steps
        step, saved = int(state.step), int(state.step)
        in_flight: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()
        batches = self._batches(state)
        with self.wall.spent("compile"):
            train_step = self.program.step
        while step < total:
            if self.stop_requested():
                self._preempt(state, saved)
            with self.wall.spent("data"):
                batch = next(batches)
            state, metrics = train_step(state, batch)
            step += 1
            in_flight.append((step, metrics))
            # The host runs two steps ahead of the device, enough to hide its own work, and no more memory.
            if len(in_flight) > 2:
                self._hand_over(*in_flight.popleft())
            if self._due(step, self.log_every) or self._pause_due(step):
                while in_flight:
                    self._hand_over(*in_flight.popleft())
                self._check(state, metrics)
            if self._due(step, self.log_every):
                self._log(step, metrics)
            if self._pause_due(step):
                self.clock.pause()
                with self.observer.pause("evaluating"), self.wall.spent("evaluation"):
                    self._evaluate(step, state, saved)
                if self._due(step, self.save_every):
                    with self.observer.pause("saving"), self.wall.spent("checkpoint"):
                        self._save(state)
                    saved = step
                self.observer.spent(step, self.wall.seconds)
        if not self.evaluations and not self.failures:
            # A run that was complete when it was resumed still reports its figures.
            with self.wall.spent("evaluation"):
                self._evaluate(step, state, saved)
        with self.wall.spent("checkpoint"):
            self.checkpoints.wait()
        self.observer.spent(step, self.wall.seconds)
        return Outcome(state, self.evaluations, self.failures, self.clock.median())

    def _batches(self, state: TrainState) -> Iterator[dict[str, jax.Array]]:
        """Global batches from the state's data position on."""
        rows = self.program.data.train(start=examples_seen(state), **readers(self.program.batch_sharding))
        return (to_global(batch, self.program.batch_sharding) for batch in rows)

    def _due(self, step: int, every: int) -> bool:
        return step == self.program.budget.total_steps or (every > 0 and step % every == 0)

    def _pause_due(self, step: int) -> bool:
        return any(self._due(step, every) for every in (self.save_every, *self.evaluate_every.values()))

    def _hand_over(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Waits for a step that the device has finished by now or will soon."""
        loss = float(metrics["loss"])
        self.clock.tick()
        self.observer.progress(step, self.program.budget.total_steps, {"loss": loss})

    def _log(self, step: int, metrics: dict[str, jax.Array]) -> None:
        seconds = self.clock.median(newest=self.log_every)
        values = {name: float(value) for name, value in metrics.items() if name != "halted"}
        values["learning_rate"] = float(self.learning_rate(step - 1))
        if np.isfinite(seconds):
            values["step_seconds"] = seconds
            values["examples_per_second"] = self.program.experiment.data.batch_size / seconds
        self.observer.write(step, "train", self.program.task.finish(values))
        self.observer.spent(step, self.wall.seconds)

    def _check(self, state: TrainState, metrics: dict[str, jax.Array]) -> None:
        """Stops at a number that is not finite, with the evidence."""
        if not bool(metrics["halted"]):
            return
        bad = int(state.step) + 1
        # The step that halted left the data position at its own batch.
        batch = next(self._batches(state))
        diagnosis = diagnose(self.program, state, batch)
        self._save(state)
        self.checkpoints.wait()
        command = self.observer.evidence(diagnosis, to_host(batch))
        raise RunError(
            f"step {bad}: {diagnosis.leaf} is not finite ({diagnosis.detail}). The state before the step is "
            f"saved as checkpoint {bad - 1}; repeat the step with\n  {command}"
        )

    def _evaluate(self, step: int, state: TrainState, saved: int) -> None:
        for name, evaluator in self.program.experiment.evaluators.items():
            if not self._due(step, self.evaluate_every[name]):
                continue

            def check_stop() -> None:
                if self.stop_requested():
                    self._preempt(state, saved)

            try:
                variables = self.program.variables(state, evaluator.ema)
                values = self.evaluators[name](self.program, variables, check_stop)
            except Preempted:
                raise
            except Exception as error:
                # One broken evaluator must not cost a week of training: it is said now, marked in its
                # metrics, and makes the run exit non-zero at the end.
                reason = str(error) if isinstance(error, EffjaxError) else f"{type(error).__name__}: {error}"
                self.failures[name] = reason
                self.observer.say(f"evaluator {name!r} failed at step {step}: {reason}")
                values = {"failed": 1.0}
            self.evaluations[name] = values
            self.observer.write(step, name, values)

    def _save(self, state: TrainState) -> None:
        self.checkpoints.save(int(state.step), state, {"examples": examples_seen(state)})

    def _preempt(self, state: TrainState, saved: int) -> None:
        """Saves and stops; a halted state is saved too, it is the good state before the bad step."""
        step = int(state.step)
        with self.wall.spent("checkpoint"):
            if step != saved or step == 0:
                self._save(state)
            self.checkpoints.wait()
        self.observer.spent(step, self.wall.seconds)
        raise Preempted(f"told to stop: saved at step {step}. Run the same command again to resume.")
