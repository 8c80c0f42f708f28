"""What step caches, and methods that reduce tokens, do to the pictures of a trained diffusion model."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from effjax.diffusion.caches import StepCache
from effjax.diffusion.examples import example_keys
from effjax.diffusion.generate import Sampling, calibrated, walk_classes
from effjax.measure.latency import compare
from effjax.parallel.sharding import activate
from effjax.train.program import Program
from experiments.run import sampling
from experiments.run.accelerating import FOLDER, WHOLE, Source, solved, with_method
from experiments.run.closing import print_table
from experiments.run.files import to_json, write_atomic
from experiments.run.formatting import duration
from experiments.run.method_spec import Asked
from experiments.run.plots import film_strips, image_grid, pareto
from experiments.run.report import Figure, Section, Table, with_section


@dataclasses.dataclass(frozen=True)
class Sampled:
    """One row of the table.

    Attributes:
      label: the method as it was asked for, or `full model`.
      settings: the method with every field, as text.
      calls: of the network, over all steps.
      computed: calls at which all of its layers ran; by branches, as many calls as its branches are worth.
      distance: root mean square difference to the full model's pictures, over the spread of these.
      pictures: how many were drawn at once.
      seconds: for all of them, the median of several.
      speedup: over the full model, the median of neighbouring turns.
    """

    label: str
    settings: str
    calls: int
    computed: float
    distance: float
    pictures: int
    seconds: float
    speedup: float


def run(
    source: Source, methods: Sequence[Asked], request: sampling.Request, *, rounds: int, out: str | None
) -> None:
    """Draws the same pictures by every method; leaves a table, files and the section of the report."""
    rows, pictures = measure(source.program, source.variables, methods, request, rounds)
    folder = Path(out) if out is not None else (source.folder or Path()) / FOLDER
    write_atomic(folder / "table.json", to_json([dataclasses.asdict(row) for row in rows]))
    write_atomic(folder / "distance_seconds.png", front(rows))
    write_atomic(folder / "pictures.png", pictures)
    print_table(f"{source.name}, {rows[0].pictures} pictures", *text_rows(rows))
    page = None if source.folder is None else source.folder / "report.html"
    if page is not None and page.is_file():
        write_atomic(page, with_section(page.read_text(), section(rows, pictures)))
        print(f"report    {page}")
    print(f"pictures  {folder}")


def measure(
    program: Program, variables: Any, methods: Sequence[Asked], request: sampling.Request, rounds: int
) -> tuple[list[Sampled], bytes]:
    """The rows, and a grid with one row of pictures a method, the full model's first.

    Raises:
      UsageError: for a request that cannot be sampled, or a method that the model does not take.
    """
    how, told, shape = sampling.prepared(program, request)
    labels = jnp.asarray(np.repeat(told, request.per_class, axis=0))
    keys = example_keys(jax.random.key(request.seed), jnp.arange(len(labels)))
    variables = program.experiment.train.precision.cast(variables)

    ways: dict[str, tuple[Program, Sampling, str]] = {WHOLE: (program, how, "")}
    for asked in methods:
        if isinstance(asked.method, StepCache):
            few = min(len(labels), sampling.FEW)
            cached = dataclasses.replace(how, cache=asked.method)
            cached = calibrated(program.task, variables, labels[:few], shape, cached, keys[:few])
            ways[asked.label] = program, cached, repr(asked.method)
        else:
            method = solved(program, asked)
            ways[asked.label] = with_method(program, method), how, repr(method)

    functions = {
        label: _drawing(made.task, variables, labels, shape, sampling_, keys)
        for label, (made, sampling_, _) in ways.items()
    }
    calls = how.sampler.steps * how.sampler.evaluations
    with activate(program.mesh, program.rules):
        drawn = {label: jax.device_get(function()) for label, function in functions.items()}
        timed = compare(functions, [()], repeats=rounds)
    whole = drawn[WHOLE][0]
    rows = [
        Sampled(
            label=label,
            settings=ways[label][2],
            calls=calls,
            computed=_computed(calls, memory),
            distance=_distance(pictures, whole),
            pictures=len(labels),
            seconds=timed.timings[label].median,
            speedup=timed.speedup(label),
        )
        for label, (pictures, memory) in drawn.items()
    ]
    each = slice(0, None, request.per_class)  # the first picture of every row
    grid = np.concatenate([pictures[each] for pictures, _ in drawn.values()])
    shown = sampling.to_bytes(np.asarray(program.task.pictures(variables, grid)))
    return rows, image_grid(film_strips(shown) if shown.ndim == 5 else shown, len(told))


def _drawing(task: Any, variables: Any, labels: Any, shape: Any, how: Sampling, keys: Any) -> Any:
    """All pictures in one program, and what its denoiser remembers at the end."""

    @jax.jit
    def draw(variables: Any) -> tuple[Any, Any]:
        state, _ = walk_classes(task, variables, labels, shape, how, keys)
        return state.x, state.memory

    return lambda: draw(variables)


def _computed(calls: int, memory: Any) -> float:
    return float(calls if memory is None else memory.whole_calls)


def _distance(pictures: Float[np.ndarray, "n *shape"], whole: Float[np.ndarray, "n *shape"]) -> float:
    return float(np.sqrt(np.mean((pictures - whole) ** 2)) / np.std(whole))


def text_rows(rows: Sequence[Sampled]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and cells, numbers as people read them."""
    cells: list[tuple[str, ...]] = [
        (
            row.label,
            f"{row.computed:.3g} of {row.calls}",
            f"{row.distance:.3g}",
            duration(row.seconds),
            f"{row.speedup:.2f}x",
        )
        for row in rows
    ]
    return ("method", "whole calls", "distance", "time", "speed-up"), cells


def section(rows: Sequence[Sampled], pictures: bytes) -> Section:
    """What a report says of it."""
    headings, cells = text_rows(rows)
    names = ", ".join(row.label for row in rows)
    parts: list[Any] = [
        Table(headings, cells),
        Figure(front(rows), "distance to the full model's pictures against time", plot=True),
        Figure(pictures, "the same pictures by every method", f"Rows from the top: {names}."),
    ]
    return Section("Accelerated", parts)


def front(rows: Sequence[Sampled]) -> bytes:
    """Distance against seconds, with the Pareto front."""
    points: Mapping[str, tuple[float, float]] = {row.label: (row.seconds, row.distance) for row in rows}
    return pareto(points, "seconds of all pictures", "distance", larger_is_better=False)
