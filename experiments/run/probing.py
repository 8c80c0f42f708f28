"""What a trained language model finds in its context: probes at several lengths."""

from collections.abc import Sequence
from typing import Any

from effjax.config import build
from effjax.data import Data
from effjax.data.probes import KINDS, Probe, ProbeMixture
from effjax.errors import UsageError, did_you_mean
from effjax.parallel.sharding import activate
from effjax.train.evaluators import Metrics
from effjax.train.program import Program
from effjax.train.tasks.language import Language
from experiments.run.accelerated_writing import answered, ways_of
from experiments.run.formatting import count
from experiments.run.method_spec import Asked
from experiments.run.restore import read_weights


def probe_table(
    program: Program, variables: Any, names: Sequence[str], lengths: Sequence[int], examples: int
) -> list[list[str]]:
    """A row for each probe: its name, and the share of right answers at each length.

    A run that was trained on probes is asked with the tokens of those, and any other with all of its own.

    Raises:
      UsageError: before anything is compiled: for a run that is no language model, an unknown probe, or a
        length that a probe or the model does not take.
    """
    asked = evaluators(program, names, lengths, examples)
    shares = {
        which: evaluator.open(read_weights)(program, variables, lambda: None)["accuracy"]
        for which, evaluator in asked.items()
    }
    return [[name, *(f"{shares[name, length]:.3f}" for length in lengths)] for name in names]


def written_table(
    program: Program,
    variables: Any,
    methods: Sequence[Asked],
    names: Sequence[str],
    lengths: Sequence[int],
    examples: int,
) -> list[list[str]]:
    """The same decoded token by token, by the full model and by each method.

    A row for each of them and each probe: which, the probe, bytes of the caches of a sequence of the last
    length, and the share of right answers at each length.

    Raises:
      UsageError: as `probe_table` does, and for a method that does not suit the model.
    """
    asked = evaluators(program, names, lengths, examples)
    ways = ways_of(program, variables, methods)
    rows = []
    with activate(program.mesh, program.rules):
        for label, way in ways.items():
            for name in names:
                told = [answered(way, asked[name, length], examples) for length in lengths]
                shares = [f"{share:.3f}" for share, _ in told]
                rows.append([label, name, f"{count(told[-1][1])}B", *shares])
    return rows


def evaluators(
    program: Program, names: Sequence[str], lengths: Sequence[int], examples: int
) -> dict[tuple[str, int], Metrics]:
    """What asks each probe at each length.

    Raises:
      UsageError: as `probe_table` does.
    """
    task = program.task
    if not isinstance(task, Language):
        raise UsageError(f"--probes needs a language model, and this run is {type(task).__name__.lower()}.")
    for name in names:
        if name not in KINDS:
            raise UsageError(f"--probes names {name!r}, which is no probe. {did_you_mean(name, KINDS)}")
    model: Any = task.model
    limit = model.max_length
    if limit is not None and max(lengths) > limit:
        raise UsageError(
            f"--lengths names {max(lengths)}, and the model is made for {limit} tokens (max_length): leave "
            f"longer ones out."
        )
    made = {
        (name, length): Metrics(probe_data(program, name, length, examples), every="1 steps")
        for name in names
        for length in lengths
    }
    for evaluator in made.values():
        evaluator.open(read_weights)
    return made


def probe_data(program: Program, name: str, length: int, examples: int) -> Data:
    """Sequences that no training has seen."""
    trained = program.experiment.data.source
    known = isinstance(trained, Probe | ProbeMixture)
    vocab = trained.vocab if known else program.experiment.model.vocab
    task = dict(kind=name)
    source = dict(kind="probe", task=task, length=length, vocab=vocab, examples=examples, seed=2**31)
    batch = program.experiment.data.batch_size
    return build(Data, dict(source=source, batch_size=batch, threads=0), f"--probes={name}")
