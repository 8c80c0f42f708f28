"""Benchmarks as ratios within one run.

    python -m experiments.bench loop --config=configs/vision/vit.py:digits
    python -m experiments.bench models --config=configs/vision/vit.py:s16,configs/vision/swin.py:tiny

`loop`: the time of a step in the training loop over that of the bare compiled step (target: at most 1.05),
and the rate of the input pipeline over the rate at which the step takes batches (target: at least 3).

`models`: forward pass and training step of each config beside timm's version, where the extra `parity` is
installed: images a second, the peak of memory, the ratio. Writes bench.md, bench.json and bench.png to --out;
docs/bench.md says what is measured and what can be believed.
"""

import contextlib
import itertools
import time
from collections.abc import Mapping
from typing import Any

from absl import flags

from experiments import cli

cli.define_configs("configs/vision/vit.py:digits")
STEPS = flags.DEFINE_integer(
    "steps", None, "steps of one measurement; by default 100 of a loop, 1 of a model"
)
ROUNDS = flags.DEFINE_integer("rounds", 5, "measurements of each candidate, taken in turn")
BATCH = flags.DEFINE_integer("batch", 8, "models: pictures a step")
SIZE = flags.DEFINE_integer(
    "size", None, "models: side of the pictures; by default what the config trains on"
)
OUT = flags.DEFINE_string("out", "bench", "models: the folder for the table and the plot")


class Silent:
    """An observer and checkpoints that cost nothing, so that what is left is the loop."""

    def progress(self, step: int, total: int, values: Mapping[str, float]) -> None:
        """Nothing."""

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Nothing."""

    def say(self, message: str) -> None:
        """Nothing."""

    def pause(self, label: str) -> contextlib.AbstractContextManager[None]:
        """Nothing."""
        return contextlib.nullcontext()

    def spent(self, step: int, seconds: Any) -> None:
        """Says nothing."""

    def evidence(self, diagnosis: Any, batch: Any) -> str:
        """Nothing."""
        return ""

    def save(self, step: int, state: Any, extra: dict[str, Any]) -> None:
        """Nothing."""

    def wait(self) -> None:
        """Nothing."""


def bench_loop(loaded: cli.LoadedConfig, steps: int, rounds: int) -> dict[str, float]:
    """Times the bare step, the loop around it and the input pipeline in turn; returns medians and ratios."""
    import dataclasses

    import jax
    import numpy as np

    from effjax.experiment import resolve
    from effjax.parallel.sharding import to_global
    from effjax.train.loop import fit
    from effjax.train.program import build_program
    from experiments.run.restore import read_weights

    experiment = resolve(loaded.config)
    # Log as often as the config says; evaluation and checkpoints are not the loop's own time.
    train = dataclasses.replace(experiment.train, steps=f"{steps} steps", checkpoint_every=f"{steps} steps")
    experiment = dataclasses.replace(experiment, train=train, evaluators={})
    data = experiment.data.open()
    program = build_program(experiment, data)
    step = program.step
    batches = data.train()
    fixed = to_global(next(batches), program.batch_sharding)

    def bare() -> float:
        state = jax.block_until_ready(program.init())
        began = time.perf_counter()
        for _ in range(steps):
            state, metrics = step(state, fixed)
        jax.block_until_ready(metrics)
        return (time.perf_counter() - began) / steps

    def loop() -> float:
        state = jax.block_until_ready(program.init())
        began = time.perf_counter()
        fit(
            program,
            state,
            checkpoints=Silent(),
            observer=Silent(),
            stop_requested=lambda: False,
            read=read_weights,
        )
        return (time.perf_counter() - began) / steps

    def inputs() -> float:
        # What was prefetched during the other measurements must not be counted as made in this one.
        for _ in itertools.islice(batches, experiment.data.prefetch + experiment.data.threads):
            pass
        began = time.perf_counter()
        for _ in itertools.islice(batches, steps):
            pass
        return (time.perf_counter() - began) / steps

    bare(), loop()
    times = np.array([(bare(), loop(), inputs()) for _ in range(rounds)])
    bare_time, loop_time, input_time = np.median(times, axis=0)
    return {
        "bare step, ms": 1e3 * bare_time,
        "step in the loop, ms": 1e3 * loop_time,
        "loop / bare": float(np.median(times[:, 1] / times[:, 0])),
        "input batch, ms": 1e3 * input_time,
        "input rate / consumption": float(np.median(times[:, 0] / times[:, 2])),
    }


def report_loop() -> None:
    """Runs `loop` and prints it."""
    from effjax.errors import UsageError
    from experiments.run.closing import closing_table
    from experiments.run.formatting import measurement

    configs = cli.load_configs()
    if len(configs) != 1:
        raise UsageError(f"loop takes one --config, not {len(configs)}.")
    figures = bench_loop(configs[0], STEPS.value or 100, ROUNDS.value)
    closing_table(f"loop: {configs[0].name}", {name: measurement(value) for name, value in figures.items()})


def report_models() -> None:
    """Runs `models`, prints each as it comes and writes the files."""
    from experiments.run import bench_report
    from experiments.run.bench_models import bench
    from experiments.run.closing import closing_table

    results = []
    for loaded in cli.load_configs():
        results.append(bench(loaded, BATCH.value, SIZE.value, STEPS.value or 1, ROUNDS.value))
        for row in bench_report.rows(results[-1:]):
            cells = dict(zip(bench_report.HEADINGS, row, strict=True))
            closing_table(f"{cells.pop('model')}, {cells.pop('step')}", cells)
        bench_report.write(OUT.value, results)


def main(argv: list[str]) -> None:
    """Runs the benchmark that is named."""
    from effjax.errors import UsageError, did_you_mean

    known = {"loop": report_loop, "models": report_models}
    if len(argv) != 2 or argv[1] not in known:
        raise UsageError(f"name one benchmark, such as `loop`. {did_you_mean(' '.join(argv[1:]), known)}")
    for flag in (STEPS, ROUNDS, BATCH, SIZE):
        if flag.value is not None and flag.value < 1:
            raise UsageError(f"--{flag.name}={flag.value} must be at least 1.")
    known[argv[1]]()


if __name__ == "__main__":
    cli.run(main, positional="loop: the training loop and the input pipeline; models: models beside timm's")
