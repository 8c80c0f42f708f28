"""What methods that reduce tokens do to a network that was trained without them."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from effjax.compress.methods import KINDS as COMPRESSIONS
from effjax.diffusion.caches import StepCache
from effjax.errors import UsageError, did_you_mean
from effjax.experiment import resolve
from effjax.measure.adaptive import macs_by_example
from effjax.measure.latency import Comparison, compare
from effjax.models.vit import ViT
from effjax.parallel.sharding import activate, readers, to_global
from effjax.tokens.solve import solve
from effjax.train.program import Program, build_program
from experiments.run.closing import print_table
from experiments.run.config_file import LoadedConfig
from experiments.run.cost import forward_cost
from experiments.run.files import to_json, write_atomic
from experiments.run.formatting import count, duration, measurement
from experiments.run.method_spec import Asked
from experiments.run.plots import pareto
from experiments.run.report import Figure, Section, Table, with_section
from experiments.run.restore import load_run, read_weights, stored_as_started
from experiments.run.token_pictures import sheet, visible
from experiments.run.training import first_state

FOLDER = "accelerate"
WHOLE = "full model"


@dataclasses.dataclass(frozen=True)
class Measured:
    """One row of the table.

    Attributes:
      label: the method as it was asked for, or `full model`.
      settings: the method with every field, as text.
      metrics: of the evaluator: accuracy, loss.
      agreement: share of the examples on which the full model says the same; None where nothing is said.
      macs: of one example; where the number of tokens depends on it, the average of a batch, of the tokens
        that exist.
      tokens: of one example, before the first block and behind each, averages over examples.
      batch: examples in a timed batch.
      seconds: of one batch, the median of several.
      speedup: over the full model, the median of neighbouring turns.
      realised: the share of the speed-up that the MACs promise.
    """

    label: str
    settings: str
    metrics: Mapping[str, float]
    agreement: float | None
    macs: int
    tokens: tuple[float, ...]
    batch: int
    seconds: float
    speedup: float
    realised: float | None


@dataclasses.dataclass(frozen=True)
class Source:
    """What is accelerated.

    Attributes:
      name: of the run or config.
      program: of it.
      variables: its weights on device.
      folder: of the run, or None.
    """

    name: str
    program: Program
    variables: Any
    folder: Path | None = None


def of_run(workdir: str, step: int | None) -> Source:
    """A trained run; its averaged weights, where it keeps any."""
    program, variables = load_run(workdir, step)
    return Source(workdir, program, variables, Path(workdir))


def of_config(loaded: LoadedConfig) -> Source:
    """The model of a config before its first step, with the weights that `config.train.start` names.

    Raises:
      UsageError: where it names none.
    """
    experiment = resolve(stored_as_started(loaded.config))
    if experiment.train.start is None:
        raise UsageError("weights are missing: --config.train.start=FOLDER, which experiments.convert wrote.")
    program = build_program(experiment, experiment.data.open())
    return Source(loaded.name, program, program.variables(first_state(program), ema=False))


def run(
    source: Source,
    methods: Sequence[Asked],
    *,
    evaluator: str | None,
    batch_size: int | None,
    rounds: int,
    out: str | None,
) -> None:
    """Measures, prints the table, writes the files and the section of the report.

    Raises:
      UsageError: for an evaluator that the config does not have, or a method that the model does not take.
    """
    name, chosen = evaluator_of(source, evaluator)
    rows, picture = measure(
        source.program, source.variables, chosen, methods, batch_size=batch_size, rounds=rounds
    )
    folder = Path(out) if out is not None else (source.folder or Path()) / FOLDER
    write(folder, rows, picture)
    print_table(f"{source.name}, {name}", *text_rows(rows))
    page = None if source.folder is None else source.folder / "report.html"
    if page is not None and page.is_file():
        write_atomic(page, with_section(page.read_text(), section(rows, picture)))
        print(f"report    {page}")
    print(f"pictures  {folder}")


def evaluator_of(source: Source, asked: str | None) -> tuple[str, Any]:
    """The evaluator that was asked for, by default the first, and its name.

    Raises:
      UsageError: for one that the config does not have.
    """
    evaluators = source.program.experiment.evaluators
    if not evaluators:
        raise UsageError(f"{source.name} has no evaluators, so nothing says how good its model is.")
    name = asked or next(iter(evaluators))
    if name not in evaluators:
        raise UsageError(f"--evaluator={name} is none of the config's. {did_you_mean(name, evaluators)}")
    return name, evaluators[name]


def with_method(program: Program, method: Any) -> Program:
    """The program of the same run whose model reduces its tokens.

    Raises:
      UsageError: for a model that has no place for it.
    """
    model = program.experiment.model
    if isinstance(method, StepCache):
        raise UsageError("a step cache is for the samplers of a diffusion run, and this is none.")
    if isinstance(method, tuple(COMPRESSIONS.values())):
        raise UsageError("leaving neurons out is for language models, and this run trained none.")
    if not hasattr(model, "reduce"):
        raise UsageError(f"{type(model).__name__} cannot reduce its tokens: no field `reduce`.")
    return with_model(program, model.clone(reduce=method))


def with_model(program: Program, model: Any) -> Program:
    """The program of the same run with another model."""
    task = dataclasses.replace(program.task, model=model)
    experiment = dataclasses.replace(program.experiment, model=model, task=task)
    return dataclasses.replace(program, experiment=experiment)


def solved(program: Program, asked: Asked) -> Any:
    """The method; where a share of the MACs is asked for, at the strength that leaves it."""
    if asked.macs is None:
        return asked.method
    whole = forward_cost(program).macs
    return solve(
        asked.method, lambda method: forward_cost(with_method(program, method)).macs, whole, asked.macs
    )


def measure(
    program: Program,
    variables: Any,
    evaluator: Any,
    methods: Sequence[Asked],
    *,
    batch_size: int | None = None,
    rounds: int = 10,
) -> tuple[list[Measured], bytes | None]:
    """Measures the full model and every method beside it.

    Args:
      program: of the run.
      variables: its weights on device.
      evaluator: what says how good a model is, and holds the data.
      methods: what to try.
      batch_size: of the timings; None takes the evaluator's.
      rounds: of the timings; models take turns in each.

    Returns:
      The rows, and a picture of where tokens went; None where the data hold no pictures.
    """
    programs = {WHOLE: program}
    for asked in methods:
        programs[asked.label] = with_method(program, solved(program, asked))
    evaluation = evaluator.open(read_weights)
    data = evaluation.data
    costs = {label: forward_cost(made) for label, made in programs.items()}
    said = {label: answers(made, variables, data) for label, made in programs.items()}
    timed, timed_batch = _timed(programs, variables, data, costs, batch_size, rounds)
    first = next(_batches(program, data))
    shown: dict[str, tuple[float, ...]] = {}
    places: dict[str, list[np.ndarray]] = {}
    for label, made in programs.items():
        shown[label], places[label] = _traced(made, variables, first)
    rows = [
        Measured(
            label=label,
            settings="" if label == WHOLE else repr(made.experiment.model.reduce),
            metrics=evaluation(made, variables, lambda: None),
            agreement=agreement(said[label], said[WHOLE]),
            macs=_macs(made, variables, first, costs[label].macs),
            tokens=shown[label],
            batch=timed_batch,
            seconds=timed.timings[label].median,
            speedup=timed.speedup(label),
            realised=timed.realised(label),
        )
        for label, made in programs.items()
    ]
    if not methods or "image" not in first:
        return rows, None
    images = visible(np.asarray(first["image"][:6], np.float32))
    return rows, sheet(images, {asked.label: places[asked.label][: len(images)] for asked in methods})


def _macs(program: Program, variables: Any, batch: Mapping[str, Any], bound: int) -> int:
    """MACs of an example: the bound that its shapes give, or the average where a method stays below it."""
    model = program.experiment.model
    if not (isinstance(model, ViT) and getattr(model.reduce, "adaptive", False)):
        return bound
    return round(float(np.mean(macs_by_example(model, variables, batch["image"]))))


def _batches(program: Program, data: Any) -> Iterator[Mapping[str, jax.Array]]:
    for batch in data.evaluate(**readers(program.batch_sharding)):
        yield to_global(batch, program.batch_sharding)


def answers(program: Program, variables: Any, data: Any) -> np.ndarray | None:
    """What the model says of every example, in order; None for a task without one answer."""
    if not hasattr(program.task, "answers"):
        return None
    answer = jax.jit(program.task.answers)
    found = []
    with activate(program.mesh, program.rules):
        for batch in _batches(program, data):
            given = np.asarray(answer(variables, batch))
            found.append(given[np.asarray(batch["mask"]) > 0])
    return np.concatenate(found)


def agreement(ours: np.ndarray | None, whole: np.ndarray | None) -> float | None:
    """The share of answers in which two models agree; None where one gives none."""
    return None if ours is None or whole is None else float(np.mean(ours == whole))


def _timed(
    programs: Mapping[str, Program],
    variables: Any,
    data: Any,
    costs: Mapping[str, Any],
    batch_size: int | None,
    rounds: int,
) -> tuple[Comparison, int]:
    """The models' evaluation passes turn by turn, and how many examples each took."""
    some = list(_first(_batches(next(iter(programs.values())), data), 4))
    if batch_size is not None:
        some = [jax.tree.map(lambda leaf: leaf[:batch_size], batch) for batch in some]
    functions = {
        label: lambda batch, made=made: made.metrics(variables, batch) for label, made in programs.items()
    }
    timed = compare(functions, [(batch,) for batch in some], repeats=rounds, costs=costs)
    return timed, len(next(iter(some[0].values())))


def _first(batches: Iterator[Any], number: int) -> Iterator[Any]:
    for _, batch in zip(range(number), batches, strict=False):
        yield batch


def _traced(
    program: Program, variables: Any, batch: Mapping[str, jax.Array]
) -> tuple[tuple[float, ...], list[np.ndarray]]:
    """Tokens before the first block and behind each; of each picture the last token that holds each patch."""
    model = program.experiment.model
    if "image" not in batch or not hasattr(model, "patch_grid"):
        return (), []
    rows = model.patch_grid(batch["image"].shape[1:3])
    patches = rows[0] * rows[1]
    with activate(program.mesh, program.rules):
        apply = jax.jit(lambda variables, images: model.apply(variables, images, mutable=["tokens"])[1])
        sown = apply(variables, batch["image"]).get("tokens", {})
    origins = {int(name.removeprefix("layer_")): np.asarray(value[0]) for name, value in sown.items()}
    every = patches + model.prefix
    counts = [float(every)]
    last = None
    for layer in range(model.depth):
        last = origins.get(layer, last)
        counts.append(every if last is None else float(np.mean([len(np.unique(o[o >= 0])) for o in last])))
    if last is None:
        last = np.broadcast_to(np.arange(every), (len(batch["image"]), every))
    return tuple(counts), [held.reshape(rows) for held in model.of_patches(last)]


def text_rows(rows: Sequence[Measured]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and cells, numbers as people read them."""
    names = list(rows[0].metrics)
    headings = (
        "method", *names, "agreement", "MACs", "of full", "tokens", "time a batch", "speed-up", "realised",
    )  # fmt: skip
    cells = [
        (
            row.label,
            *(measurement(row.metrics[name]) for name in names),
            "-" if row.agreement is None else f"{row.agreement:.1%}",
            count(row.macs),
            f"{row.macs / rows[0].macs:.0%}",
            tokens_text(row.tokens) or "-",
            duration(row.seconds),
            f"{row.speedup:.2f}x",
            "-" if row.realised is None else f"{row.realised:.0%}",
        )
        for row in rows
    ]
    return headings, cells


def tokens_text(tokens: Sequence[float]) -> str:
    """`17 15 13 12`: tokens before the first block and behind each; runs of equal ones once, `17 x4`."""
    parts: list[tuple[str, int]] = []
    for number in tokens:
        said = f"{number:.0f}" if number == int(number) else f"{number:.1f}"
        if parts and parts[-1][0] == said:
            parts[-1] = said, parts[-1][1] + 1
        else:
            parts.append((said, 1))
    return " ".join(said if times == 1 else f"{said}x{times}" for said, times in parts)


def section(rows: Sequence[Measured], picture: bytes | None) -> Section:
    """What a report says of it."""
    headings, cells = text_rows(rows)
    parts: list[Any] = [Table(headings, cells)]
    metric = quality(rows[0].metrics)
    for axis in ("macs", "seconds"):
        parts.append(Figure(front(rows, axis), f"{metric} against {axis} with the Pareto front", plot=True))
    if picture is not None:
        caption = (
            "Each patch in the colour of the token that holds it behind the last block; red: held by none."
        )
        parts.append(Figure(picture, "pictures beside what each method leaves of them", caption))
    return Section("Accelerated", parts)


def quality(metrics: Mapping[str, float]) -> str:
    """The metric that says how good a model is."""
    return next((name for name in ("accuracy", "perplexity") if name in metrics), next(iter(metrics)))


def larger_is_better(metric: str) -> bool:
    """Whether more of it is better, as of an accuracy; of losses, perplexities and distances less is."""
    return metric == "accuracy"


def front(rows: Sequence[Measured], axis: str) -> bytes:
    """Quality against MACs or seconds, with the Pareto front."""
    metric = quality(rows[0].metrics)
    points = {row.label: (float(getattr(row, axis)), row.metrics[metric]) for row in rows}
    label = {"macs": "MACs of an example", "seconds": "seconds of a batch"}[axis]
    return pareto(points, label, metric, larger_is_better=larger_is_better(metric))


def write(folder: Path, rows: Sequence[Measured], picture: bytes | None) -> None:
    """Leaves `table.json`, `accuracy_macs.png`, `accuracy_seconds.png` and `tokens.png` in the folder."""
    write_table(folder, rows)
    for axis in ("macs", "seconds"):
        write_atomic(folder / f"{quality(rows[0].metrics)}_{axis}.png", front(rows, axis))
    if picture is not None:
        write_atomic(folder / "tokens.png", picture)


def write_table(folder: Path, rows: Sequence[Measured]) -> None:
    """Leaves `table.json`."""
    write_atomic(folder / "table.json", to_json([dataclasses.asdict(row) for row in rows]))


def read(folder: Path) -> list[Measured]:
    """The rows that `write` or `write_table` left."""
    found = json.loads((folder / "table.json").read_text())
    return [Measured(**{**row, "tokens": tuple(row["tokens"])}) for row in found]
