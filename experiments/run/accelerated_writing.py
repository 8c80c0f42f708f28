"""A language model that writes with less: smaller caches, fewer tokens of a prompt, fewer layers."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.decoding.forced import forced
from effjax.decoding.gemfilter import GemFilter, compress
from effjax.decoding.layer_plan import PLANS, planned
from effjax.decoding.policies.policy import Policy
from effjax.errors import UsageError
from effjax.measure.analytic.active import decode_macs
from effjax.measure.latency import Comparison, compare
from effjax.mixers.unified_softmax import UnifiedSoftmax
from effjax.models.lm import LM
from effjax.parallel.sharding import activate
from effjax.train.program import Program
from experiments.run.accelerated_language import language_model, step_behind
from experiments.run.accelerating import FOLDER, WHOLE, Source, agreement, evaluator_of
from experiments.run.closing import print_table
from experiments.run.files import to_json, write_atomic
from experiments.run.formatting import count, duration, measurement
from experiments.run.method_spec import WRITING, Asked
from experiments.run.plots import pareto
from experiments.run.report import Figure, Section, Table, with_section
from experiments.run.restore import read_weights

# Methods that are measured token by token.
STEPWISE = (Policy, GemFilter, UnifiedSoftmax, *PLANS.values())


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to write.

    Attributes:
      model: that writes.
      variables: of it.
      gems: which tokens of a prompt it reads; None reads all.
    """

    model: LM
    variables: Any
    gems: GemFilter | None = None

    def keys(self, tokens: int) -> float:
        """That the last of so many tokens reads in a layer."""
        return float(tokens) if self.model.cache is None else self.model.cache.attended(tokens)

    def reads(self, tokens: jax.Array, first: int) -> tuple[jax.Array, int]:
        """Whole sequences as it reads them, and how many of their tokens are prompt."""
        if self.gems is None:
            return tokens, first
        lengths = jnp.full(tokens.shape[:1], first)
        chosen, _ = compress(self.model, self.variables, tokens[:, :first], lengths, self.gems)
        return jnp.concatenate([chosen, tokens[:, first:]], axis=1), chosen.shape[1]


@dataclasses.dataclass(frozen=True)
class Kept:
    """One row of the table.

    Attributes:
      label: the method as it was asked for, or `full model`.
      settings: the method with every field, as text.
      perplexity: of the targets behind the prompts.
      accuracy: share of them that were the likeliest token.
      agreement: share of them at which the full model finds the same token likeliest.
      cache_bytes: of one sequence, all layers, as the arrays say.
      keys: that a token reads on average in a layer, at the end of a sequence.
      macs: of that token.
      seconds: of that token, batch 1, the median of several.
      speedup: over the full model, the median of neighbouring turns.
    """

    label: str
    settings: str
    perplexity: float
    accuracy: float
    agreement: float
    cache_bytes: int
    keys: float
    macs: float
    seconds: float
    speedup: float


def run(
    source: Source,
    methods: Sequence[Asked],
    *,
    evaluator: str | None,
    rounds: int,
    out: str | None,
    examples: int,
) -> None:
    """Measures; leaves a table, a plot and the section of the report."""
    name, chosen = evaluator_of(source, evaluator)
    rows, first = measure(source.program, source.variables, chosen, methods, rounds, examples)
    folder = Path(out) if out is not None else (source.folder or Path()) / FOLDER
    write_atomic(folder / "writing.json", to_json([dataclasses.asdict(row) for row in rows]))
    write_atomic(folder / "quality_bytes.png", front(rows))
    print_table(f"{source.name}, {name}, prompts of {first} tokens", *text_rows(rows))
    page = None if source.folder is None else source.folder / "report.html"
    if page is not None and page.is_file():
        write_atomic(page, with_section(page.read_text(), section(rows)))
        print(f"report    {page}")
    print(f"table     {folder}")


def measure(
    program: Program,
    variables: Any,
    evaluator: Any,
    methods: Sequence[Asked],
    rounds: int,
    examples: int,
) -> tuple[list[Kept], int]:
    """Decodes the evaluator's rows by the full model and by every method.

    A row is one sequence, whatever documents it holds. Its prompt reaches to the first answer where only
    answers count, and else to the middle.

    Returns:
      The rows, and how many tokens of each sequence are its prompt.

    Raises:
      UsageError: for a model that a method does not suit.
    """
    ways = ways_of(program, variables, methods)
    made = {asked.label: asked.method for asked in methods}
    data = _first(evaluator.open(read_weights).data, examples)
    first = prompt_of(data)
    with activate(program.mesh, program.rules):
        said = {label: _said(way, data, first) for label, way in ways.items()}
        timed = _timed(ways, data[0]["tokens"], first, rounds)
    rows = []
    for label, way in ways.items():
        log_p, right, likeliest, cache_bytes, length = said[label]
        keys = way.keys(length)
        rows.append(
            Kept(
                label=label,
                settings="" if label == WHOLE else repr(made[label]),
                perplexity=float(np.exp(-np.mean(log_p))),
                accuracy=float(np.mean(right)),
                agreement=agreement(likeliest, said[WHOLE][2]) or 0.0,
                cache_bytes=cache_bytes,
                keys=keys,
                macs=decode_macs(way.model, round(keys)).total,
                seconds=timed.timings[label].median,
                speedup=timed.speedup(label),
            )
        )
    return rows, first


def ways_of(program: Program, variables: Any, methods: Sequence[Asked]) -> dict[str, Way]:
    """The full model of a run, and what every method makes of it, by their labels.

    Raises:
      UsageError: for a model that a method does not suit, or a method that is none for writing.
    """
    model = language_model(program)
    variables = {**variables, "params": program.experiment.train.precision.cast(variables["params"])}
    variables = model.layers_apart(variables)
    for asked in methods:
        if not isinstance(asked.method, STEPWISE):
            raise UsageError(
                f"--method={asked.label} changes nothing of how a model writes token by token: name one of "
                f"{', '.join(WRITING)}."
            )
    made = {asked.label: way_of(asked.method, model, variables) for asked in methods}
    return {WHOLE: Way(model, variables), **made}


def way_of(method: Any, model: LM, variables: Any) -> Way:
    """The way that a method makes of a model; what cannot be is refused before anything is compiled.

    Raises:
      UsageError: for a model that the method does not suit.
    """
    if isinstance(method, GemFilter):
        method.check(model)
        return Way(model, variables, method)
    if isinstance(method, UnifiedSoftmax):
        return Way(method.applied(model), variables)
    if isinstance(method, Policy):
        kept = model.clone(cache=method)
        jax.eval_shape(functools.partial(kept.init_cache, 1, 2))
        return Way(kept, variables)
    return Way(*planned(model, variables, method.plan(model.depth)))


def answered(way: Way, evaluator: Any, examples: int) -> tuple[float, int]:
    """The share of an evaluator's answers that are right token by token, and bytes of a row's caches."""
    data = _first(evaluator.open(read_weights).data, examples)
    _, right, _, cache_bytes, _ = _said(way, data, prompt_of(data))
    return float(np.mean(right)), cache_bytes


def _first(data: Any, examples: int) -> list[dict[str, np.ndarray]]:
    """The first rows of an evaluator, whole batches of them."""
    batches = [jax.tree.map(np.asarray, dict(batch)) for batch in data.evaluate()]
    wanted = max(-(-examples // batches[0]["tokens"].shape[0]), 1)
    return batches[:wanted]


def prompt_of(data: Sequence[Mapping[str, np.ndarray]]) -> int:
    """How many tokens stand before the first target that counts, itself a step; half where all count."""
    places = [np.argmax(np.any(batch["weights"][batch["mask"] > 0] > 0, axis=0)) for batch in data]
    length = data[0]["tokens"].shape[1]
    return int(min(places)) + 1 if min(places) > 1 else max(length // 2, 1)


def _said(
    way: Way, data: Sequence[Mapping[str, np.ndarray]], first: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, int]:
    """Of the targets that count: their log-probability, whether they were likeliest, and what was.

    And the bytes of a sequence's caches, and the tokens that are read of it.
    """
    found, cache_bytes, length = [], 0, 0
    for batch in data:
        tokens, begin = way.reads(jnp.asarray(batch["tokens"]), first)
        behind = batch["targets"][:, first - 1 :]
        targets = jnp.pad(jnp.asarray(behind), ((0, 0), (begin - 1, 0)))
        made = forced(way.model, way.variables, tokens, targets, begin)
        batch_size, length = tokens.shape
        cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(made.caches)) // batch_size
        counts = (batch["weights"] * batch["mask"][:, None])[:, first - 1 :] > 0
        likeliest = np.asarray(made.likeliest)
        found.append((np.asarray(made.log_p)[counts], (likeliest == behind)[counts], likeliest[counts]))
    log_p, right, likeliest = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return log_p, right, likeliest, cache_bytes, length


def _timed(ways: Mapping[str, Way], rows: np.ndarray, first: int, rounds: int) -> Comparison:
    """The last token of a row, in every way in turn, batch 1."""
    tokens = jnp.asarray(rows)
    functions = {
        label: step_behind(way.model, way.variables, way.reads(tokens[:1], first)[0][:, :-1])
        for label, way in ways.items()
    }
    return compare(functions, [(row[None, -1:],) for row in tokens[:8]], repeats=rounds, costs={})


def text_rows(rows: Sequence[Kept]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and cells, numbers as people read them."""
    headings: tuple[str, ...] = (
        *("method", "accuracy", "perplexity", "agreement", "cache", "keys a token"),
        *("MACs a token", "time a token", "speed-up"),
    )
    cells: list[tuple[str, ...]] = [
        (
            row.label,
            f"{row.accuracy:.4f}",
            measurement(row.perplexity),
            f"{row.agreement:.1%}",
            f"{count(row.cache_bytes)}B",
            measurement(row.keys),
            count(row.macs),
            duration(row.seconds),
            f"{row.speedup:.2f}x",
        )
        for row in rows
    ]
    return headings, cells


def section(rows: Sequence[Kept]) -> Section:
    """What a report says of it."""
    caption = "accuracy against the bytes of a sequence's caches, with the Pareto front"
    return Section("Writing", [Table(*text_rows(rows)), Figure(front(rows), caption, plot=True)])


def front(rows: Sequence[Kept]) -> bytes:
    """Accuracy against bytes, with the Pareto front."""
    points = {row.label: (row.cache_bytes, row.accuracy) for row in rows}
    return pareto(points, "bytes of caches a sequence", "accuracy", larger_is_better=True)
