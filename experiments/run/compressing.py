"""From a trained run to a smaller one: a recipe's steps, a new run folder, and what it gained."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.compress.recipe import read
from effjax.compress.storage.trees import held_bytes, stored_in, weights_in
from effjax.compress.subject import Calibration, Subject
from effjax.errors import Preempted
from effjax.layers.stored import Stored
from effjax.measure.latency import Comparison, compare
from effjax.models.lm import LM
from effjax.parallel.sharding import activate, to_global, without_mesh
from effjax.train.program import Program
from experiments.run.accelerated_language import step_behind
from experiments.run.accelerating import WHOLE, Measured, write_table
from experiments.run.closing import print_table
from experiments.run.compress_stages import Origin, Stages, digest_of
from experiments.run.config_file import LoadedConfig
from experiments.run.cost import forward_cost
from experiments.run.formatting import count, duration, measurement
from experiments.run.metrics import MetricsWriter
from experiments.run.report import Section, Table, Text, with_section
from experiments.run.restore import load_run, load_state, read_weights
from experiments.run.run_report import of_run, write_report
from experiments.run.signals import StopFlag

# Rows of the product that is timed beside one row.
MANY = 256
SIDES = ("before", "after")


@dataclasses.dataclass(frozen=True)
class Side:
    """The run as it was, or as the recipe left it.

    Attributes:
      program: of it.
      variables: its weights on device.
    """

    program: Program
    variables: Any


def run(
    workdir: str,
    recipe: LoadedConfig,
    out: str,
    *,
    step: int | None,
    ema: bool | None,
    rounds: int,
    stop: StopFlag | None = None,
) -> None:
    """Compresses a run, writes the new one, and says what it gained.

    What a step left is kept beside `out` until all are taken: the same command goes on behind it.

    Raises:
      UsageError: for a folder that is no run, a recipe that does not fit, or `out` that holds something else.
      Preempted: where SIGTERM arrived.
    """
    steps = read(recipe.config)
    program, state = load_state(workdir, step)
    averaged = state.ema is not None if ema is None else ema
    before = Side(program, program.variables(state, averaged))
    params = state.ema if averaged else state.params
    subject = Subject(program.task, {"params": params, **state.collections}, program.data.example_batch(1))
    origin = Origin(workdir, program, state, averaged, digest_of(params))
    stages = Stages(Path(out), origin, recipe)
    if not stages.complete():
        taken = stages.newest()
        with activate(program.mesh, program.rules):
            for number, left in steps.each(subject, _calibration(program, stop), taken):
                with without_mesh():
                    stages.keep(number, left)
    after = Side(*load_run(out))
    _report(Path(out), int(state.step), before, after, rounds, recipe.name)
    stages.clear()


def _calibration(program: Program, stop: StopFlag | None) -> Calibration:
    def batches() -> Iterator[Mapping[str, jax.Array]]:
        with contextlib.closing(program.data.train()) as rows:
            for row in rows:
                there = {"mask": np.ones(len(next(iter(row.values()))), np.float32)}
                yield to_global({**there, **row}, program.batch_sharding)

    def other(folder: str) -> Subject:
        with without_mesh():  # a program is built outside of another's mesh
            found, variables = load_run(folder)
        return Subject(found.task, variables, program.data.example_batch(1))

    def report(line: str) -> None:
        print(line, flush=True)
        if stop is not None and stop.requested:
            raise Preempted("told to stop. Run the same command again to go on behind the last whole step.")

    return Calibration(batches, jax.random.key(program.experiment.train.seed), report, open=other)


def _report(path: Path, step: int, before: Side, after: Side, rounds: int, recipe: str) -> None:
    rows: list[tuple[str, ...]] = []
    sides = (before, after)
    bytes_ = [held_bytes(side.variables["params"]) for side in sides]
    rows.append(("bytes of the weights", *(count(b) for b in bytes_)))
    weights = [weights_in(side.variables["params"]) for side in sides]
    rows.append(("weights", *(count(w) for w in weights)))
    bits = [8 * b / w for b, w in zip(bytes_, weights, strict=True)]
    rows.append(("bits a parameter", *(f"{b:.2f}" for b in bits)))
    costs = {name: forward_cost(side.program) for name, side in zip(SIDES, sides, strict=True)}
    rows.append(("MACs an example", *(count(cost.macs) for cost in costs.values())))
    metrics: list[dict[str, float]] = []
    figures: dict[str, float] = {}
    for name, evaluator in after.program.experiment.evaluators.items():
        told = [evaluator.open(read_weights)(side.program, side.variables, lambda: None) for side in sides]
        both = [metric for metric in told[0] if metric in told[1]]
        rows += [(f"{name} {m}", *(measurement(t[m]) for t in told)) for m in both]
        with MetricsWriter(path, restored_step=step) as writer:
            writer.write(step, name, told[1])
        figures |= {f"{name} {m}": v for m, v in told[1].items()}
        metrics = metrics or told
    times, batch = _times(before, after, rounds, costs)
    for what, timed in times.items():
        rows.append((f"time of {what}", *(duration(t.median) for t in timed.timings.values())))
        rows.append((f"speed-up of {what}", "", f"{timed.speedup('after'):.2f}x"))
    if metrics:
        write_table(path, _measured(metrics, costs, times["a batch"], batch, recipe))
    products = _products(after, rounds)
    headings = ("", *SIDES)
    page = of_run(
        path,
        title=f"{type(after.program.experiment.model).__name__}, compressed",
        summary={name: measurement(value) for name, value in figures.items()},
        curves={},
    )
    where = write_report(path, page)
    parts: list[Any] = [Table(headings, rows), Text(PRODUCTS), Table(PRODUCT_HEADINGS, products)]
    where.write_text(with_section(where.read_text(), Section("Compressed", parts)))
    print_table(str(path), headings, rows)
    print_table("a product with each layout", PRODUCT_HEADINGS, products)
    print(f"report    {where}")


def _measured(
    metrics: Sequence[Mapping[str, float]],
    costs: Mapping[str, Any],
    timed: Comparison,
    batch: int,
    recipe: str,
) -> list[Measured]:
    """The rows of a comparison: the run as it was, and what the recipe left."""
    return [
        Measured(
            label=WHOLE if name == "before" else recipe,
            settings="" if name == "before" else recipe,
            metrics=told,
            agreement=None,
            macs=costs[name].macs,
            tokens=(),
            batch=batch,
            seconds=timed.timings[name].median,
            speedup=timed.speedup(name),
            realised=timed.realised(name),
        )
        for name, told in zip(SIDES, metrics, strict=True)
    ]


def _times(
    before: Side, after: Side, rounds: int, costs: Mapping[str, Any]
) -> tuple[dict[str, Comparison], int]:
    """A batch of the first evaluator and how many examples it holds, and of a language model a token."""
    evaluators = before.program.experiment.evaluators
    found: dict[str, Comparison] = {}
    batch = 0
    if evaluators:
        data = next(iter(evaluators.values())).data.open()
        with contextlib.closing(data.evaluate()) as rows:
            sharding = before.program.batch_sharding
            batches = [to_global(batch, sharding) for batch in itertools.islice(rows, 2)]
        ways = {
            name: lambda batch, side=side: side.program.metrics(side.variables, batch)
            for name, side in zip(SIDES, (before, after), strict=True)
        }
        found["a batch"] = compare(ways, [(batch,) for batch in batches], repeats=rounds, costs=costs)
        batch = len(next(iter(batches[0].values())))
    model = after.program.experiment.model
    if isinstance(model, LM) and before.program.experiment.model == model:
        prompt = jnp.zeros((1, min(64, (model.max_length or 65) - 1)), jnp.int32)
        steps = {
            name: step_behind(model, model.layers_apart(side.variables), prompt)
            for name, side in zip(SIDES, (before, after), strict=True)
        }
        found["a token"] = compare(steps, [(prompt[:, :1],)], repeats=rounds, costs={})
    return found, batch


PRODUCTS = (
    "Times of a product with the largest kernel of each layout, beside those with the same weights in "
    "bfloat16 and in float32, on this device. One that is slower than either saves memory, and no time."
)
PRODUCT_HEADINGS = ("layout", "kernel", "rows", "time", "bfloat16", "float32", "brings")


def _products(side: Side, rounds: int) -> list[tuple[str, ...]]:
    """What a product takes, in one row and in many, for every layout."""
    largest: dict[Any, tuple[str, Stored]] = {}
    for path, leaf in stored_in(side.variables["params"]).items():
        layout = leaf.layout  # type: ignore[attr-defined]
        if layout not in largest or np.prod(leaf.shape) > np.prod(largest[layout][1].shape):
            largest[layout] = path, leaf
    rows = []
    for layout, (path, leaf) in largest.items():
        front = len(leaf.shape) - len(leaf.ins) - len(leaf.outs)  # type: ignore[attr-defined]
        for _ in range(front):
            leaf = jax.tree.map(lambda x: x[0], leaf)
        matrix = leaf.whole(jnp.float32)
        for number in (1, MANY):
            timed = _timed_product(leaf, matrix, number, rounds)
            seconds = {name: timing.median for name, timing in timed.timings.items()}
            faster = seconds["stored"] < min(seconds["bfloat16"], seconds["float32"])
            rows.append(
                (
                    repr(layout),
                    f"{path} {'x'.join(map(str, leaf.shape))}",
                    str(number),
                    *(duration(seconds[name]) for name in ("stored", "bfloat16", "float32")),
                    "time and memory" if faster else "memory only",
                )
            )
    return rows


def _timed_product(leaf: Any, matrix: jax.Array, number: int, rounds: int) -> Comparison:
    ins = leaf.ins
    contracted = tuple(range(1, 1 + len(ins)))
    order = tuple(range(-len(ins), 0)) if leaf.turned else tuple(range(len(ins)))
    order = tuple(axis % matrix.ndim for axis in order)

    def plain(kernel: jax.Array) -> Any:
        axes = (contracted, order), ((), ())
        return jax.jit(lambda x: jax.lax.dot_general(x.astype(kernel.dtype), kernel, axes))

    stored = jax.jit(lambda x, kernel: kernel.product(x))
    ways = {
        "bfloat16": plain(matrix.astype(jnp.bfloat16)),
        "float32": plain(matrix),
        "stored": lambda x: stored(x, leaf),
    }
    inputs = [(jax.random.normal(jax.random.key(i), (number, *ins)),) for i in range(2)]
    return compare(ways, inputs, repeats=rounds, costs={})
