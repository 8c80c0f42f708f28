"""What cache policies do to a language model that was trained to see everything."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.decoding.forced import forced
from effjax.decoding.policies.policy import Policy
from effjax.measure.analytic.active import decode_macs
from effjax.measure.latency import Comparison, compare
from effjax.models.lm import LM
from effjax.parallel.sharding import activate
from effjax.train.program import Program
from experiments.run.accelerated_language import language_model
from experiments.run.accelerating import FOLDER, WHOLE, Source, agreement, evaluator_of
from experiments.run.closing import print_table
from experiments.run.files import to_json, write_atomic
from experiments.run.formatting import count, duration, measurement
from experiments.run.method_spec import Asked
from experiments.run.plots import pareto
from experiments.run.report import Figure, Section, Table, with_section
from experiments.run.restore import read_weights


@dataclasses.dataclass(frozen=True)
class Kept:
    """One row of the table.

    Attributes:
      label: the policy as it was asked for, or `full model`.
      settings: the policy with every field, as text.
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
    write_atomic(folder / "caches.json", to_json([dataclasses.asdict(row) for row in rows]))
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
    """Decodes the evaluator's rows by the full model and under every policy.

    A row is one sequence, whatever documents it holds. Its prompt reaches to the first answer where only
    answers count, and else to the middle.

    Returns:
      The rows, and how many tokens of each sequence are its prompt.

    Raises:
      UsageError: for a model that has no keys and values.
    """
    model = language_model(program)
    variables = {**variables, "params": program.experiment.train.precision.cast(variables["params"])}
    variables = model.layers_apart(variables)
    ways: dict[str, Policy] = {WHOLE: Policy()} | {asked.label: asked.method for asked in methods}
    data = _first(evaluator.open(read_weights).data, examples)
    first = prompt_of(data)
    length = data[0]["tokens"].shape[1]
    models = {label: model.clone(cache=policy) for label, policy in ways.items()}
    for made in models.values():
        jax.eval_shape(functools.partial(made.init_cache, 1, length))  # what cannot be is refused at once
    with activate(program.mesh, program.rules):
        said = {label: _said(made, variables, data, first) for label, made in models.items()}
        timed = _timed(models, variables, data[0]["tokens"], rounds)
    rows = []
    for label, policy in ways.items():
        log_p, right, likeliest, cache_bytes = said[label]
        keys = policy.attended(length)
        rows.append(
            Kept(
                label=label,
                settings="" if label == WHOLE else repr(policy),
                perplexity=float(np.exp(-np.mean(log_p))),
                accuracy=float(np.mean(right)),
                agreement=agreement(likeliest, said[WHOLE][2]) or 0.0,
                cache_bytes=cache_bytes,
                keys=keys,
                macs=decode_macs(model, round(keys)).total,
                seconds=timed.timings[label].median,
                speedup=timed.speedup(label),
            )
        )
    return rows, first


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
    model: LM, variables: Any, data: Sequence[Mapping[str, np.ndarray]], first: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Of the targets that count: their log-probability, whether they were likeliest, and what was."""
    found, cache_bytes = [], 0
    for batch in data:
        tokens, targets = jnp.asarray(batch["tokens"]), jnp.asarray(batch["targets"])
        made = forced(model, variables, tokens, targets, first)
        cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(made.caches)) // tokens.shape[0]
        counts = (batch["weights"] * batch["mask"][:, None])[:, first - 1 :] > 0
        likeliest = np.asarray(made.likeliest)
        right = likeliest == batch["targets"][:, first - 1 :]
        found.append((np.asarray(made.log_p)[counts], right[counts], likeliest[counts]))
    log_p, right, likeliest = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return log_p, right, likeliest, cache_bytes


def _timed(models: Mapping[str, LM], variables: Any, rows: np.ndarray, rounds: int) -> Comparison:
    """The last token of a row, by every policy in turn, batch 1."""
    tokens = jnp.asarray(rows)
    functions = {label: _last(model, variables, tokens[:1, :-1]) for label, model in models.items()}
    return compare(functions, [(row[None, -1:],) for row in tokens[:8]], repeats=rounds, costs={})


def _last(model: LM, variables: Any, prompt: jax.Array) -> Any:
    """The compiled step behind a prompt."""
    made = forced(model, variables, prompt, prompt, prompt.shape[1])
    place = jnp.full((1, 1), prompt.shape[1])
    step = jax.jit(lambda token, caches: model.apply(variables, token, caches, place, method="step"))
    return lambda token: step(token, made.caches)


def text_rows(rows: Sequence[Kept]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and cells, numbers as people read them."""
    headings: tuple[str, ...] = (
        *("policy", "accuracy", "perplexity", "agreement", "cache", "keys a token"),
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
    return Section("Caches", [Table(*text_rows(rows)), Figure(front(rows), caption, plot=True)])


def front(rows: Sequence[Kept]) -> bytes:
    """Accuracy against bytes, with the Pareto front."""
    points = {row.label: (row.cache_bytes, row.accuracy) for row in rows}
    return pareto(points, "bytes of caches a sequence", "accuracy", larger_is_better=True)
