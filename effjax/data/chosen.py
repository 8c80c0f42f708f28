"""Documents that a large language model knows and a small one does not: MiniPLM's difference sampling.

    s(x) = ( log p(x) - log p_ref(x) ) / |x|            |x| bytes of a document, its end among them
    kept   documents from the highest s down, until a share of all bytes is there

p is the large model and p_ref a small one that was trained on some of the same text. What both find easy is
common, and what both find hard is noise. Both read the text once, whatever number of students learn from it,
and each with its own tokenizer, since documents are compared and not tokens:
`python -m experiments.score_text` writes the file of scores.

Gu et al., "MiniPLM: Knowledge Distillation for Pre-Training Language Models", ICLR 2025, arXiv:2410.17215,
section 2.2; the share of 0.5 is theirs. Their instances are rows of 1024 tokens, ours documents: rows are
packed anew in every epoch.
"""

import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, Int64

from effjax.config import part
from effjax.data import sources
from effjax.data.pipeline import eval_batches
from effjax.data.records import Example, Metadata
from effjax.data.text import Documents, PackedRows
from effjax.errors import RunError, UsageError


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A source of the documents with the highest scores of another source.

    Attributes:
      scores: the file that `experiments.score_text` wrote.
      source: all documents.
      share: of their bytes that is kept; 1 keeps all.
      drawn: seed of an order by chance in the place of that by scores, to compare with; None is by scores.
    """

    scores: str
    source: Any = part(sources.KINDS)
    share: float = 0.5
    drawn: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UsageError(f"share={self.share} of the text must be above 0 and at most 1.")

    def open(self) -> "ChosenReader":
        """Raises UsageError for a file of scores that is missing, or of other documents."""
        reader = self.source.open()
        scores, sizes = read_scores(self.scores)
        if len(scores) != len(reader):
            raise UsageError(
                f"'{self.scores}' scores {len(scores)} documents and the source has {len(reader)}: "
                "score it again with python -m experiments.score_text."
            )
        if self.drawn is not None:
            scores = np.random.Generator(np.random.PCG64(self.drawn)).random(len(scores))
        return ChosenReader(reader, best(scores, sizes, self.share))


class ChosenReader:
    """Some documents of a source, in its order."""

    def __init__(self, reader: sources.Reader, numbers: Int64[np.ndarray, "kept"]):
        self._reader = reader
        self._numbers = numbers
        known = reader.metadata.identity
        which = hashlib.sha256(numbers.tobytes()).hexdigest()
        self.metadata = Metadata(identity=f"{known}, documents {which}" if known else "")

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Example:
        return self._reader[int(self._numbers[index])]


def best(
    scores: Float[np.ndarray, "documents"], sizes: Int64[np.ndarray, "documents"], share: float
) -> Int64[np.ndarray, "kept"]:
    """Numbers of the documents with the highest scores that together reach a share of the bytes, rising.

    Args:
      scores: of every document; of two alike the first goes before.
      sizes: of every document in bytes.
      share: of all bytes.
    """
    order = np.argsort(-scores, kind="stable")
    before = np.cumsum(sizes[order]) - sizes[order]
    return np.sort(order[before < share * sizes.sum()])


def log_likelihoods(
    documents: Documents,
    length: int,
    batch_size: int,
    losses: Callable[[Mapping[str, np.ndarray]], Float[np.ndarray, "b n"]],
) -> Float64[np.ndarray, "documents"]:
    """log p of every document: of each of its tokens behind the separator, and of the one that ends it.

    Rows hold the documents one behind the other, as evaluation packs them, so that one that does not fit into
    what is left of a row is read in parts, each without what stood before. The end of the last document is
    not scored.

    Args:
      documents: what is scored.
      length: tokens of a row.
      batch_size: rows that are scored at once.
      losses: -log p of every target of a batch, in nats.
    """
    starts = np.cumsum(documents.lengths)
    found = np.zeros(len(documents.lengths))
    rows = PackedRows(documents, length, seed=None)
    for number, batch in enumerate(eval_batches(rows, (), batch_size=batch_size)):
        counted = (batch["weights"] > 0) & (batch["mask"] > 0)[:, None]  # [B, N]
        places = (number * batch_size + np.arange(batch_size))[:, None] * length + np.arange(length)  # [B, N]
        owners = np.searchsorted(starts, places[counted], side="right")
        np.add.at(found, owners, -np.asarray(losses(batch), np.float64)[counted])
    return found


def difference(
    large: Float64[np.ndarray, "documents"],
    small: Float64[np.ndarray, "documents"],
    sizes: Int64[np.ndarray, "documents"],
) -> Float64[np.ndarray, "documents"]:
    """Scores in nats a byte.

    Args:
      large: log p of every document by the large model.
      small: the same by the small one.
      sizes: bytes of every document.

    Raises:
      RunError: for a likelihood that is not finite.
    """
    for name, values in (("large", large), ("small", small)):
        if not np.isfinite(values).all():
            worst = int(np.flatnonzero(~np.isfinite(values))[0])
            raise RunError(f"the {name} model gives document {worst} no finite likelihood.")
    return (large - small) / sizes


def write_scores(
    path: str | Path,
    scores: Float64[np.ndarray, "documents"],
    sizes: Int64[np.ndarray, "documents"],
    origin: Mapping[str, Any],
) -> None:
    """Writes scores with the sizes of the documents and where they come from."""
    with Path(path).expanduser().open("xb") as file:
        np.savez(file, scores=scores, sizes=sizes, origin=json.dumps(dict(origin)))


def read_scores(
    path: str | Path,
) -> tuple[Float64[np.ndarray, "documents"], Int64[np.ndarray, "documents"]]:
    """Scores and sizes of documents.

    Raises:
      UsageError: for a file that is missing or no file of scores.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UsageError(
            f"There are no scores at '{path}': write them with python -m experiments.score_text, and name "
            "the file with config.data.source.scores."
        )
    try:
        with np.load(file, allow_pickle=False) as held:
            return held["scores"], held["sizes"]
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"'{path}' is no file of scores: {error}") from None
