"""Times models, each beside timm's version where there is one: `python -m experiments.bench models`.

Both sides of a pair run in processes of their own and take turns, A B A B, so that other load falls on both.
The least time of each is what the machine can do; the ratio of neighbouring turns shows how far to trust it.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

import jax
import numpy as np
from flax.core import meta

from effjax import catalog
from effjax.errors import RunError, UsageError
from effjax.experiment import resolve
from effjax.measure.cost import count
from effjax.train.tasks.classification import Classification
from experiments.cli import LoadedConfig
from experiments.run.timm_names import NAMES

STEPS = ("forward", "train")


@dataclasses.dataclass(frozen=True)
class Side:
    """One side's runs of one step.

    Attributes:
      seconds: every turn that counts, in order, by the clock.
      cpu: the same, summed over the threads of the process: other load hardly moves it.
      peak: the largest memory of its process until after these runs, in bytes; what compiling took is in it.
    """

    seconds: tuple[float, ...]
    cpu: tuple[float, ...]
    peak: int


@dataclasses.dataclass(frozen=True)
class Pair:
    """One step of one model, here and in timm.

    Attributes:
      ours: this library's side.
      timm: the other side, or None where there is none.
    """

    ours: Side
    timm: Side | None = None

    @property
    def ratio(self) -> float | None:
        """timm's least time over ours: above 1 we are faster."""
        return None if self.timm is None else min(self.timm.seconds) / min(self.ours.seconds)

    @property
    def cpu_ratio(self) -> float | None:
        """The same ratio of the least work of all threads, for machines that others use too."""
        return None if self.timm is None else min(self.timm.cpu) / min(self.ours.cpu)

    @property
    def spread(self) -> tuple[float, float] | None:
        """Quartiles of that ratio over neighbouring turns."""
        if self.timm is None:
            return None
        low, high = np.quantile(np.divide(self.timm.seconds, self.ours.seconds), (0.25, 0.75))
        return float(low), float(high)


@dataclasses.dataclass(frozen=True)
class Result:
    """What was measured of one config.

    Attributes:
      config: its name.
      timm: the architecture it was compared with, or None.
      batch: pictures a step.
      size: height and width of a picture.
      parameters: counted.
      macs: of one picture, counted.
      top1: the published accuracy in percent, or None.
      steps: by name.
    """

    config: str
    timm: str | None
    batch: int
    size: tuple[int, int]
    parameters: int
    macs: int
    top1: float | None
    steps: Mapping[str, Pair]

    def record(self) -> dict[str, Any]:
        """Plain data."""
        plain = dataclasses.asdict(self)
        for name, pair in self.steps.items():
            plain["steps"][name] |= {
                "ratio": pair.ratio,
                "ratio_quartiles": pair.spread,
                "cpu_ratio": pair.cpu_ratio,
            }
        return plain


def bench(loaded: LoadedConfig, batch: int, size: int | None, runs: int, rounds: int) -> Result:
    """Times one config; see the module's docstring.

    Args:
      loaded: of a classifier of pictures.
      batch: pictures a step.
      size: side of the pictures; None means what the config trains on.
      runs: runs of a side in one turn.
      rounds: turns of each side.

    Raises:
      UsageError: for a config of another kind.
      RunError: where a side fails.
    """
    experiment = resolve(loaded.config)
    if not isinstance(experiment.task, Classification):
        raise UsageError(f"{loaded.name} is no classifier of pictures: bench models times only those.")
    model = experiment.task.model
    pictures = experiment.data.described().example_batch(1)["image"].shape[1:]
    shape = pictures if size is None else (size, size, pictures[-1])
    cost = _count(model, shape)
    architecture = NAMES.get(loaded.name) if _installed() else None
    asked = dict(batch=batch, shape=shape, classes=model.classes)
    sides = {"ours": asked | dict(config=loaded.config.to_dict())}
    if architecture is not None:
        sides["timm"] = asked | dict(timm=architecture)
    return Result(
        config=loaded.name,
        timm=architecture,
        batch=batch,
        size=shape[:2],
        parameters=cost.parameters,
        macs=cost.macs,
        top1=_published().get(loaded.name),
        steps=_take_turns(sides, runs, rounds),
    )


def _count(model: Any, shape: Sequence[int]) -> Any:
    picture = jax.ShapeDtypeStruct((1, *shape), np.float32)
    variables = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), picture))
    params = variables.pop("params")

    def forward(params, collections, pictures):
        return model.apply({"params": params, **collections}, pictures)

    return count(forward, params, variables, picture)


def _installed() -> bool:
    return all(importlib.util.find_spec(name) for name in ("torch", "timm"))


def _published() -> dict[str, float]:
    """Top-1 accuracies of the catalogue, by config."""
    sizes = [size for entry in catalog.load() for size in entry.sizes]
    return {size.config: size.top1 for size in sizes if size.top1 is not None}


def _take_turns(asked: Mapping[str, dict[str, Any]], runs: int, rounds: int) -> dict[str, Pair]:
    with contextlib.ExitStack() as open_workers:
        workers = {name: open_workers.enter_context(worker(request)) for name, request in asked.items()}
        return {step: _time(workers, step, runs, rounds) for step in STEPS}


def _time(workers: Mapping[str, "Worker"], step: str, runs: int, rounds: int) -> Pair:
    for worker in workers.values():
        for _ in range(2):  # the first run compiles
            worker.ask(step)
    turns: dict[str, list[tuple[float, float, int]]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            answers = [worker.ask(step) for _ in range(runs)]
            seconds, cpu = (sum(answer[what] for answer in answers) / runs for what in ("seconds", "cpu"))
            turns[name].append((seconds, cpu, answers[-1]["peak"]))
    sides = {}
    for name, taken in turns.items():
        seconds, cpu, peaks = zip(*taken, strict=True)
        sides[name] = Side(seconds, cpu, max(peaks))
    return Pair(**sides)


@contextlib.contextmanager
def worker(request: dict[str, Any]) -> Iterator["Worker"]:
    """A process that times one side, until the block ends."""
    command = [sys.executable, "-m", "experiments.run.bench_worker", json.dumps(request)]
    environment = {"JAX_PLATFORMS": "cpu"} | os.environ
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=environment) as process,
    ):
        try:
            yield Worker(process, log)
        finally:
            process.kill()


class Worker:
    """A running `experiments.run.bench_worker`."""

    def __init__(self, process: subprocess.Popen[str], log: IO[str]) -> None:
        self.process, self.log = process, log
        self._read()

    def ask(self, step: str) -> dict[str, Any]:
        """Runs a step once.

        Raises:
          RunError: where the process ended, or says what went wrong.
        """
        assert self.process.stdin is not None
        self.process.stdin.write(f"{step}\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        said = json.loads(line) if line else {"error": self._last_words()}
        if "error" in said:
            raise RunError(said["error"])
        return said

    def _last_words(self) -> str:
        self.log.seek(0)
        lines = [line.strip() for line in self.log.read().splitlines() if line.strip()]
        return f"a side of the benchmark ended: {(lines or ['it said nothing'])[-1][:400]}"
