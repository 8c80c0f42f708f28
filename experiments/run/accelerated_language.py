"""What methods that leave neurons out do to a language model that was trained without them."""

import contextlib
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.compress.cats import Thresholding, left_out
from effjax.compress.methods import KINDS
from effjax.compress.rows import by_rows
from effjax.decoding.prefill import new_caches
from effjax.errors import UsageError
from effjax.measure.analytic.active import decode_macs
from effjax.measure.latency import Comparison, compare
from effjax.models.lm import LM
from effjax.parallel.sharding import activate
from effjax.train.program import Program
from experiments.run.accelerating import FOLDER, WHOLE, Source, agreement, answers, evaluator_of, with_model
from experiments.run.closing import print_table
from experiments.run.files import to_json, write_atomic
from experiments.run.formatting import count, duration, measurement
from experiments.run.method_spec import Asked
from experiments.run.plots import pareto
from experiments.run.report import Figure, Section, Table, with_section
from experiments.run.restore import read_weights


@dataclasses.dataclass(frozen=True)
class Written:
    """One row of the table.

    Attributes:
      label: the method as it was asked for, or `full model`.
      settings: the method with every field, as text.
      metrics: of the evaluator: perplexity, loss.
      agreement: share of places at which the full model finds the same token likeliest.
      left_out: share of neurons that did not count, over layers and the evaluator's tokens.
      macs: of one decoded token at the end of a row, with what is left out not counted.
      seconds: of that token, the median of several.
      speedup: over the full model, the median of neighbouring turns.
    """

    label: str
    settings: str
    metrics: Mapping[str, float]
    agreement: float
    left_out: float
    macs: float
    seconds: float
    speedup: float


def run(
    source: Source, methods: Sequence[Asked], *, evaluator: str | None, rounds: int, out: str | None
) -> None:
    """Measures; leaves a table, a plot and the section of the report."""
    name, chosen = evaluator_of(source, evaluator)
    rows = measure(source.program, source.variables, chosen, methods, rounds)
    folder = Path(out) if out is not None else (source.folder or Path()) / FOLDER
    write_atomic(folder / "table.json", to_json([dataclasses.asdict(row) for row in rows]))
    write_atomic(folder / "perplexity_seconds.png", front(rows))
    print_table(f"{source.name}, {name}", *text_rows(rows))
    page = None if source.folder is None else source.folder / "report.html"
    if page is not None and page.is_file():
        write_atomic(page, with_section(page.read_text(), section(rows)))
        print(f"report    {page}")
    print(f"table     {folder}")


def measure(
    program: Program, variables: Any, evaluator: Any, methods: Sequence[Asked], rounds: int
) -> list[Written]:
    """Measures the full model and every method beside it; thresholds come from the run's training text.

    Raises:
      UsageError: for a method that is none for language models.
    """
    ways: dict[str, tuple[Program, Any, str]] = {WHOLE: (program, variables, "")}
    for asked in methods:
        if not isinstance(asked.method, Thresholding):
            raise UsageError(
                f"--method={asked.label} is none for language models: choose from {', '.join(KINDS)}."
            )
        with contextlib.closing(program.data.train()) as text:  # type: ignore[type-var]
            some = list(itertools.islice(text, asked.method.batches))
        model, held = asked.method.applied(language_model(program), variables, some)
        ways[asked.label] = with_model(program, model), held, repr(asked.method)
    evaluation = evaluator.open(read_weights)
    said = {label: answers(made, held, evaluation.data) for label, (made, held, _) in ways.items()}
    first = next(iter(evaluation.data.evaluate()))
    timed = _timed(ways, first, rounds)
    rows = []
    for label, (made, held, settings) in ways.items():
        model = language_model(made)
        out = 0.0 if label == WHOLE else float(np.mean(left_out(model, held, evaluation.data.evaluate())))
        rows.append(
            Written(
                label=label,
                settings=settings,
                metrics=evaluation(made, held, lambda: None),
                agreement=agreement(said[label], said[WHOLE]) or 0.0,
                left_out=out,
                macs=decode_macs(model, first["tokens"].shape[1], 1 - out).total,
                seconds=timed.timings[label].median,
                speedup=timed.speedup(label),
            )
        )
    return rows


def language_model(program: Program) -> LM:
    """The model of a run.

    Raises:
      UsageError: for one that is not made of identical decoder blocks.
    """
    model = program.experiment.model
    if not isinstance(model, LM):
        raise UsageError(
            f"a decoding step is made cheaper for an LM of like decoder blocks, and "
            f"{type(model).__name__} is none."
        )
    return model


def _timed(
    ways: Mapping[str, tuple[Program, Any, str]], batch: Mapping[str, np.ndarray], rounds: int
) -> Comparison:
    """One more token behind a row without its last, by every model in turn, batch 1."""
    rows = jnp.asarray(batch["tokens"])
    program = ways[WHOLE][0]
    functions = {label: _step(made, held, rows[:1, :-1]) for label, (made, held, _) in ways.items()}
    with activate(program.mesh, program.rules):
        return compare(functions, [(row[None, -1:],) for row in rows[:8]], repeats=rounds, costs={})


def _step(program: Program, variables: Any, prompt: jax.Array) -> Any:
    """The compiled step of a model that has read the prompt, with the weights as decoding wants them."""
    model = language_model(program)
    variables = {**variables, "params": program.experiment.train.precision.cast(variables["params"])}
    if hasattr(model.block.ffn, "by_rows"):
        model, variables = by_rows(model, variables)
    with activate(program.mesh, program.rules):
        return step_behind(model, model.layers_apart(variables), prompt)


def step_behind(model: LM, variables: Any, prompt: jax.Array) -> Any:
    """What a token takes behind a prompt: the compiled step, with caches that have room for it."""
    step = jax.jit(lambda variables, token, caches: model.apply(variables, token, caches, method="step"))
    caches = new_caches(model, variables, 1, prompt.shape[1] + 1)
    _, caches = step(variables, prompt, caches)
    return lambda token: step(variables, token, caches)


def text_rows(rows: Sequence[Written]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and cells, numbers as people read them."""
    names = list(rows[0].metrics)
    headings = ("method", *names, "agreement", "left out", "MACs a token", "time a token", "speed-up")
    cells = [
        (
            row.label,
            *(measurement(row.metrics[name]) for name in names),
            f"{row.agreement:.1%}",
            f"{row.left_out:.1%}",
            count(row.macs),
            duration(row.seconds),
            f"{row.speedup:.2f}x",
        )
        for row in rows
    ]
    return headings, cells


def section(rows: Sequence[Written]) -> Section:
    """What a report says of it."""
    caption = "perplexity against the time of one decoded token, with the Pareto front"
    return Section("Accelerated", [Table(*text_rows(rows)), Figure(front(rows), caption, plot=True)])


def front(rows: Sequence[Written]) -> bytes:
    """Perplexity against seconds, with the Pareto front."""
    points = {row.label: (row.seconds, row.metrics["perplexity"]) for row in rows}
    return pareto(points, "seconds a token", "perplexity", larger_is_better=False)
