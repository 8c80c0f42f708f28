"""What two trained language models think of every document of a config's training text."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.data.chosen import Chosen, difference, log_likelihoods, write_scores
from effjax.data.text import Documents, index_documents
from effjax.errors import UsageError
from effjax.experiment import resolve
from effjax.parallel.sharding import activate
from effjax.train.program import Program
from effjax.train.tasks.language import Language, cross_entropy
from experiments.run.closing import closing_table
from experiments.run.restore import load_run


def run(config: Any, large: str, small: str, out: str, *, batch: int = 16) -> int:
    """Writes the file and prints what was found; returns the exit code.

    Raises:
      UsageError: for runs that are no language models of packed text, or a file that exists.
    """
    if batch < 1:
        raise UsageError(f"--batch={batch} must be at least 1.")
    if Path(out).exists():
        raise UsageError(f"'{out}' exists: name another file.")
    source = resolve(config).data.source
    if isinstance(source, Chosen):
        source = source.source
    reader = source.open()
    found, sizes = [], np.zeros(0, np.int64)
    for workdir in (large, small):
        program, variables = load_run(workdir)
        packing = program.experiment.data.packing
        if not isinstance(program.task, Language) or packing is None:
            raise UsageError(f"'{workdir}' is no run of a language model on packed text.")
        documents = index_documents(reader, packing.tokenizer, reader.metadata.identity)
        found.append(_scored(program, variables, documents, packing.length, batch))
        sizes = documents.sizes
    scores = difference(found[0], found[1], sizes)
    write_scores(out, scores, sizes, dict(large=large, small=small, source=dataclasses.asdict(source)))
    nats = [-float(values.sum()) / int(sizes.sum()) / np.log(2) for values in found]
    closing_table(
        f"scores of {len(scores)} documents",
        {
            "bits a byte, large": f"{nats[0]:.4f}",
            "bits a byte, small": f"{nats[1]:.4f}",
            "middle score": f"{np.median(scores):.4f} nats a byte",
            "lowest, highest": f"{scores.min():.4f}, {scores.max():.4f}",
            "file": out,
        },
    )
    return 0


def _scored(program: Program, variables: Any, documents: Documents, length: int, batch: int) -> np.ndarray:
    model = program.task.model
    variables = program.experiment.train.precision.cast(variables)

    @jax.jit
    def losses(variables: Any, batch: Mapping[str, Any]) -> Any:
        logits = model.apply(variables, batch["tokens"], batch["positions"], batch["segments"])
        return cross_entropy(logits, batch["targets"])[0]

    def ask(rows: Mapping[str, np.ndarray]) -> np.ndarray:
        with activate(program.mesh, program.rules):
            asked = {name: jnp.asarray(rows[name]) for name in ("tokens", "targets", "positions", "segments")}
            return np.asarray(losses(variables, asked))

    return log_likelihoods(documents, length, batch, ask)
