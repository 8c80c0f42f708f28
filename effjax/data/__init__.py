"""Data: what a config's `data` section resolves to, and how a loop reads it.

data = build(Data, config.data, "config.data").open()
for batch in data.train(start=state.examples, process_index=jax.process_index(), ...): ...
for batch in data.evaluate(): ...       # batch["mask"] says which rows are real
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from effjax.config import part
from effjax.data import images, pipeline, sources, text, video
from effjax.data.chosen import Chosen
from effjax.data.expected import Described, Expected
from effjax.data.records import Batch, Cached, Examples, Metadata, Readable
from effjax.errors import UsageError

__all__ = ["Data", "Described", "Expected", "Metadata", "OpenData", "Packing"]


@dataclasses.dataclass(frozen=True)
class Packing:
    """How documents become rows.

    Args:
      length: tokens a row.
      tokenizer: a kind of `effjax.data.text.KINDS`.
    """

    length: int
    tokenizer: Any = part(text.KINDS, default=text.Bytes())

    def __post_init__(self) -> None:
        if self.length < 1:
            raise UsageError(f"length={self.length} must be at least 1 token.")


@dataclasses.dataclass(frozen=True)
class Data:
    """The schema of a config's `data` section.

    Args:
      batch_size: rows of the global batch, over all processes.
      source: a kind of `effjax.data.sources.KINDS`, or some documents of one, `effjax.data.chosen`.
      transforms: kinds of `effjax.data.images.KINDS` and `effjax.data.video.KINDS`, applied in turn.
      packing: for text: the rows that documents are packed into.
      seed: of order and augmentation.
      threads: how many batches are made at the same time; 0 makes them in the caller's thread.
      prefetch: how many batches are kept ready.
      max_bad_share: the share of broken records above which the run fails.
      cache: whether decoded examples stay in memory; for small data sets.
      cache_limit: the most bytes that may take.
      expected: what the source holds, for planning where it is not; compared with it where it is.
    """

    batch_size: int
    source: Any = part({**sources.KINDS, "chosen": Chosen})
    transforms: tuple[Any, ...] = part({**images.KINDS, **video.KINDS}, default=())
    packing: Packing | None = None
    seed: int = 0
    threads: int = 2
    prefetch: int = 4
    max_bad_share: float = 0.01
    cache: bool = False
    cache_limit: int = 2**30
    expected: Expected | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.max_bad_share <= 1.0:
            raise UsageError(f"max_bad_share={self.max_bad_share} must be a share between 0 and 1.")
        for name, least in (("batch_size", 1), ("prefetch", 1), ("threads", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name}={getattr(self, name)} must be at least {least}.")

    def open(self) -> "OpenData":
        """Opens the source: prepares an embedded data set, indexes files, measures documents."""
        return OpenData(self)

    def described(self) -> Described:
        """What is known of the data without reading it; an embedded source, which is always here, is opened.

        Raises:
          UsageError: for a source that is neither expected nor here.
        """
        if self.packing or (self.expected and self.expected.fields):
            return AbsentData(self)
        try:
            return self.open()
        except UsageError as error:
            raise UsageError(
                f"{error} To plan without the data, say in the config what it holds: data.expected = dict("
                "examples=..., fields=dict(image=dict(shape=(None, None, 3), dtype='uint8'), "
                "label=dict(dtype='int64')))."
            ) from None


@dataclasses.dataclass(frozen=True)
class AbsentData:
    """Data that is described by its config alone."""

    definition: Data

    @property
    def num_examples(self) -> int | None:
        """As expected."""
        return self.definition.expected.examples if self.definition.expected else None

    def example_batch(self, rows: int | None = None) -> Batch:
        """Zeros with the shapes and types of a training batch; `rows` is `batch_size` by default."""
        data = self.definition
        if data.packing:
            return zeros_like_batch(data, text.blank_row(data.packing.length), rows)
        assert data.expected is not None  # `described` made sure
        return zeros_like_batch(data, data.expected.example(), rows)


def zeros_like_batch(data: Data, example: Mapping[str, Any], rows: int | None) -> Batch:
    """Zeros with the shapes and types that an example has in a training batch."""
    rng = np.random.Generator(np.random.Philox(0))
    changed = dict(example)
    for transform in data.transforms:
        changed = transform(changed, rng)
    one = pipeline.stack([changed])
    count = data.batch_size if rows is None else rows
    return {name: np.zeros((count, *value.shape[1:]), value.dtype) for name, value in one.items()}


class OpenData:
    """Data that can be read. Both ways of reading come from the same files and share what was indexed."""

    def __init__(self, data: Data):
        self.definition = data
        reader = data.source.open()
        self.metadata: Metadata = reader.metadata
        self._readable = Readable(reader, data.max_bad_share)
        self._examples: Examples = self._readable
        if data.cache:
            self._examples = Cached(self._readable, data.cache_limit)

    @property
    def num_examples(self) -> int:
        """Examples of one epoch of training; rows, where text is packed."""
        return len(self._rows) if self._rows else len(self._examples)

    @property
    def bad_records(self) -> Mapping[int, str]:
        """The broken records met so far, each with what is wrong with it."""
        return self._readable.bad

    @property
    def tokenizer(self) -> text.Tokenizer | None:
        """The tokenizer of packed text, None for other data."""
        return self.definition.packing.tokenizer if self.definition.packing else None

    @property
    def bytes_per_token(self) -> float | None:
        """Of packed text, how many bytes a target stands for on average; None for other data.

        Evaluation scores every token once but the first, a separator, which counts as one byte.
        """
        if not self._documents:
            return None
        return (int(self._documents.sizes.sum()) - 1) / (int(self._documents.lengths.sum()) - 1)

    def train(self, *, start: int = 0, process_index: int = 0, process_count: int = 1) -> Iterator[Batch]:
        """Endless shuffled batches, this process's rows of each, from global example number `start` on.

        Raises:
          UsageError: if an epoch is smaller than a batch, or the processes do not divide the batch.
        """
        data = self.definition
        if self.num_examples < data.batch_size:
            raise UsageError(
                f"batch_size={data.batch_size} is more than the {self.num_examples} examples of an epoch. "
                f"Take at most {self.num_examples}."
            )
        return pipeline.train_batches(
            self._rows.row if self._rows else pipeline.Shuffled(self._examples, data.seed),
            data.transforms,
            batch_size=data.batch_size,
            seed=data.seed,
            start=start,
            process_index=process_index,
            process_count=process_count,
            threads=data.threads,
            prefetch=data.prefetch,
        )

    def evaluate(self, *, process_index: int = 0, process_count: int = 1) -> Iterator[Batch]:
        """One pass in order, this process's rows of each batch; `mask` `[rows]` is 1 for real ones."""
        data = self.definition
        examples = self._examples
        if self._documents and data.packing:
            examples = text.PackedRows(self._documents, data.packing.length, seed=None)
        return pipeline.eval_batches(
            examples,
            data.transforms,
            batch_size=data.batch_size,
            process_index=process_index,
            process_count=process_count,
            threads=data.threads,
            prefetch=data.prefetch,
        )

    def example_batch(self, rows: int | None = None) -> Batch:
        """Zeros with the shapes and types of a training batch; `rows` is `batch_size` by default."""
        expected = self.definition.expected
        example = self._rows[0] if self._rows else self._examples[0]
        if expected:
            expected.check(example)
        return zeros_like_batch(self.definition, example, rows)

    @functools.cached_property
    def _documents(self) -> text.Documents | None:
        packing = self.definition.packing
        if not packing:
            return None
        return text.index_documents(self._examples, packing.tokenizer, self.metadata.identity)

    @functools.cached_property
    def _rows(self) -> text.PackedRows | None:
        packing = self.definition.packing
        if not self._documents or not packing:
            return None
        return text.PackedRows(self._documents, packing.length, self.definition.seed)
