"""From a trained run to a smaller one: a recipe's steps, a new run folder, and what it gained."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from effjax import models
from effjax.compress.recipe import read
from effjax.compress.storage import kinds as storage
from effjax.compress.storage.trees import held_bytes, stored_in, weights_in
from effjax.compress.subject import Calibration, Subject
from effjax.errors import UsageError
from effjax.experiment import resolve
from effjax.interop.converted import section
from effjax.layers.stored import Stored
from effjax.measure.latency import Comparison, compare
from effjax.models.lm import LM
from effjax.parallel.sharding import activate, to_global
from effjax.train.checkpoint import Checkpoints
from effjax.train.program import Program, build_program
from effjax.train.state import TrainState, examples_seen
from experiments import cli
from experiments.run.accelerated_language import step_behind
from experiments.run.closing import print_table
from experiments.run.config_file import LoadedConfig
from experiments.run.cost import forward_cost
from experiments.run.files import to_json
from experiments.run.formatting import count, duration, measurement
from experiments.run.metrics import MetricsWriter
from experiments.run.report import Section, Table, Text, with_section
from experiments.run.restore import load_config_of, load_run, load_state, read_weights
from experiments.run.run_report import of_run, write_report
from experiments.run.workdir import Workdir

# Rows of the product that is timed beside one row.
MANY = 256


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
    workdir: str, recipe: LoadedConfig, out: str, *, step: int | None, ema: bool | None, rounds: int
) -> None:
    """Compresses a run, writes the new one, and says what it gained.

    Raises:
      UsageError: for a folder that is no run, a recipe that does not fit, or `out` that holds something.
    """
    steps = read(recipe.config)
    program, state = load_state(workdir, step)
    averaged = state.ema is not None if ema is None else ema
    before = Side(program, program.variables(state, averaged))
    params = state.ema if averaged else state.params
    subject = Subject(program.task, {"params": params, **state.collections}, program.data.example_batch(1))
    with activate(program.mesh, program.rules):
        subject = steps.apply(subject, _calibration(program))
    config = _config_of(workdir, program, subject)
    experiment = resolve(config)
    after = build_program(experiment, program.data)
    with Workdir.create_or_resume(out, config, command=cli.command_line(), config_file=recipe.name) as folder:
        if folder.resumed:
            raise UsageError(f"--out='{out}' holds a run already. Name another folder.")
        made = _state(after, state, subject)
        with contextlib.closing(Checkpoints(folder.path / "checkpoints", keep=1)) as saved:
            saved.save(int(made.step), made, {"examples": examples_seen(made)})
        folder.write("recipe.json", to_json({"from": workdir, "recipe": recipe.config.to_dict()}, indent=2))
        small = Side(after, after.variables(made, ema=False))
        _report(folder.path, int(made.step), before, small, rounds)


def _calibration(program: Program) -> Calibration:
    def batches() -> Iterator[Mapping[str, jax.Array]]:
        with contextlib.closing(program.data.train()) as rows:
            for row in rows:
                there = {"mask": np.ones(len(next(iter(row.values()))), np.float32)}
                yield to_global({**there, **row}, program.batch_sharding)

    def other(folder: str) -> Subject:
        found, variables = load_run(folder)
        return Subject(found.task, variables, program.data.example_batch(1))

    return Calibration(batches, jax.random.key(program.experiment.train.seed), open=other)


def _config_of(workdir: str, program: Program, subject: Subject) -> ConfigDict:
    """The config of the new run."""
    config = ConfigDict(load_config_of(workdir).to_dict())
    if subject.model != program.task.model:
        config.model = ConfigDict(section(subject.model, models.KINDS))
    layouts = {path: leaf.layout for path, leaf in stored_in(subject.params).items()}  # type: ignore[attr-defined]
    config.storage = {path: section(layout, storage.KINDS) for path, layout in layouts.items()}
    if not all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(subject.params)):
        config.optimizer = ConfigDict(dict(kind="still"))  # what is stored in codes does not train
    # There is no average beside what a recipe leaves.
    config.train.start, config.train.ema = None, None
    for evaluator in config.get("evaluators", {}).values():
        evaluator.ema = False
    return config


def _state(program: Program, state: TrainState, subject: Subject) -> TrainState:
    made = TrainState.create(
        params=subject.params,
        opt_state=program.optimizer.init(subject.params),
        key=jax.random.key(0),
        collections={name: value for name, value in subject.variables.items() if name != "params"},
    )
    made = dataclasses.replace(made, step=state.step, key=state.key, examples=state.examples)
    return jax.device_put(made, program.shardings)


def _report(path: Path, step: int, before: Side, after: Side, rounds: int) -> None:
    rows: list[tuple[str, ...]] = []
    bytes_ = [held_bytes(side.variables["params"]) for side in (before, after)]
    rows.append(("bytes of the weights", *(count(b) for b in bytes_)))
    weights = [weights_in(side.variables["params"]) for side in (before, after)]
    rows.append(("weights", *(count(w) for w in weights)))
    bits = [8 * b / w for b, w in zip(bytes_, weights, strict=True)]
    rows.append(("bits a parameter", *(f"{b:.2f}" for b in bits)))
    rows.append(("MACs an example", *(count(forward_cost(side.program).macs) for side in (before, after))))
    figures: dict[str, float] = {}
    for name, evaluator in after.program.experiment.evaluators.items():
        told = [
            evaluator.open(read_weights)(side.program, side.variables, lambda: None)
            for side in (before, after)
        ]
        rows += [(f"{name} {m}", *(measurement(t[m]) for t in told)) for m in told[0]]
        with MetricsWriter(path, restored_step=step) as writer:
            writer.write(step, name, told[1])
        figures |= {f"{name} {m}": v for m, v in told[1].items()}
    for what, timed in _times(before, after, rounds).items():
        rows.append((f"time of {what}", *(duration(t.median) for t in timed.timings.values())))
        rows.append((f"speed-up of {what}", "", f"{timed.speedup('after'):.2f}x"))
    products = _products(after, rounds)
    headings = ("", "before", "after")
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


def _times(before: Side, after: Side, rounds: int) -> dict[str, Comparison]:
    """A batch of the first evaluator, and of a language model a token."""
    evaluators = before.program.experiment.evaluators
    found: dict[str, Comparison] = {}
    if evaluators:
        data = next(iter(evaluators.values())).data.open()
        with contextlib.closing(data.evaluate()) as rows:
            sharding = before.program.batch_sharding
            batches = [to_global(batch, sharding) for batch in itertools.islice(rows, 2)]
        ways = {
            name: lambda batch, side=side: side.program.metrics(side.variables, batch)
            for name, side in (("before", before), ("after", after))
        }
        found["a batch"] = compare(ways, [(batch,) for batch in batches], repeats=rounds, costs={})
    model = after.program.experiment.model
    if isinstance(model, LM) and before.program.experiment.model == model:
        prompt = jnp.zeros((1, min(64, (model.max_length or 65) - 1)), jnp.int32)
        steps = {
            name: step_behind(model, model.layers_apart(side.variables), prompt)
            for name, side in (("before", before), ("after", after))
        }
        found["a token"] = compare(steps, [(prompt[:, :1],)], repeats=rounds, costs={})
    return found


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
