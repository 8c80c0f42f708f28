"""From examples by number to batches by number, on any number of hosts.

Global batch s of a run that has consumed `start` examples holds the global example numbers
`start + [s*B, (s+1)*B)`. Which example stands behind a global number, and how it is augmented, are functions
of the seed and that number alone, so the data position of a run is one integer, valid for any number of hosts
and threads. grain makes batches ahead of time in threads; what is in them is decided by the arithmetic below.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import grain
import numpy as np

from effjax.data.order import EpochOrder
from effjax.data.records import Batch, Example, Examples
from effjax.errors import UsageError


@runtime_checkable
class Transform(Protocol):
    """Example to example. What it does not change it passes on; it never writes into an array it got."""

    random: ClassVar[bool]

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Draws from `rng` if `random`, and from nothing else."""


class Shuffled:
    """An endless stream over a source: epoch after epoch, each in its own order."""

    def __init__(self, source: Examples, seed: int):
        self._source = source
        self._order = EpochOrder(len(source), seed)

    def __call__(self, number: int) -> Example:
        """Returns the example behind a global number."""
        epoch, place = divmod(number, len(self._source))
        return self._source[int(self._order.of(epoch)[place])]


def train_batches(
    stream: Callable[[int], Example],
    transforms: Sequence[Transform],
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 2,
    prefetch: int = 4,
) -> Iterator[Batch]:
    """Endless batches; this process's rows of each, in the order of their global numbers.

    Args:
      stream: global example number to example: `Shuffled(source, seed)`, or `text.PackedRows.row`.
      transforms: applied in turn to each example.
      batch_size: rows of the global batch, over all processes.
      seed: of the augmentation.
      start: how many examples the run has consumed.
      process_index: which rows are ours: the `process_index`-th part of `process_count` equal ones.
      process_count: how many processes read the same stream.
      threads: how many batches are made at the same time; 0 makes them in the caller's thread.
      prefetch: how many batches are kept ready.

    Yields:
      Field name to array `[batch_size / process_count, ...]`; integers are int32 and floats float32.

    Raises:
      UsageError: if the processes do not divide the batch, or the examples do not stack to a batch.
    """
    rows = _rows_per_process(batch_size, process_index, process_count)

    def batch(step: int) -> Batch:
        first = start + step * batch_size + process_index * rows
        rng = np.random.Generator(np.random.Philox(seed))
        examples = []
        for number in range(first, first + rows):
            example = stream(number)
            seek(rng, number)
            for transform in transforms:
                example = transform(example, rng)
            examples.append(example)
        return stack(examples)

    return _in_threads(sys.maxsize, batch, threads, prefetch)


def eval_batches(
    source: Examples,
    transforms: Sequence[Transform],
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 2,
    prefetch: int = 4,
) -> Iterator[Batch]:
    """One pass in order. The last batch is filled up with the first example; `mask` says what is real.

    Yields:
      Like `train_batches`, with one more field: `mask` `[rows]` float32, 1 for an example and 0 for filling.

    Raises:
      UsageError: as `train_batches`, and for a transform that is random.
    """
    rows = _rows_per_process(batch_size, process_index, process_count)
    for transform in transforms:
        if transform.random:
            raise UsageError(
                f"{type(transform).__name__} is random, and evaluation must not be: take it out of the "
                "transforms of the evaluation data."
            )
    rng = np.random.Generator(np.random.Philox(0))  # handed to transforms that do not draw from it

    def batch(step: int) -> Batch:
        first = step * batch_size + process_index * rows
        examples = []
        for number in range(first, first + rows):
            example = source[number if number < len(source) else 0]
            for transform in transforms:
                example = transform(example, rng)
            examples.append(example)
        mask = np.arange(first, first + rows) < len(source)
        return stack(examples) | {"mask": mask.astype(np.float32)}

    return _in_threads(-(-len(source) // batch_size), batch, threads, prefetch)


def stack(examples: Sequence[Example]) -> Batch:
    """Stacks examples to a batch, in JAX's default widths: int32 and float32.

    Raises:
      UsageError: for a field that is no array of numbers, whose shape varies between examples, or whose
        integers need more than 32 bits.
    """
    batch = {}
    for name in examples[0]:
        values = [example[name] for example in examples]
        try:
            column = np.array(values)
        except ValueError:
            shapes = sorted({np.shape(value) for value in values})[:4]
            raise UsageError(
                f"The field {name!r} has different shapes in one batch ({', '.join(map(str, shapes))}, ...). "
                "Add a transform that makes them equal, such as dict(kind='resize', size=(224, 224))."
            ) from None
        if column.dtype.kind not in "biuf":
            raise UsageError(
                f"The field {name!r} holds {type(values[0]).__name__}, no numbers, and cannot go into a "
                "batch. Name the fields to read in the source, such as fields=('image', 'label'), or pack "
                "text by `packing`."
            )
        if column.dtype in (np.int64, np.uint64, np.uint32):
            narrow = column.astype(np.int32)
            if not np.array_equal(narrow, column):
                raise UsageError(
                    f"The field {name!r} holds numbers that int32 cannot, such as {column.max()}. Leave it "
                    "out: name the fields to read in the source, such as fields=('image', 'label')."
                )
            column = narrow
        elif column.dtype == np.float64:
            column = column.astype(np.float32)
        batch[name] = column
    return batch


def seek(rng: np.random.Generator, number: int) -> None:
    """Puts a Philox generator at the beginning of the numbers that belong to one example.

    Philox is a counter run through a cipher: the top word of the counter is the example, the words below
    count what is drawn. Half the time that a new generator takes.
    """
    state: dict[str, Any] = dict(rng.bit_generator.state)
    state["state"]["counter"][:] = (0, 0, 0, number)
    state["buffer_pos"] = 4  # nothing is left over from the example before
    state["has_uint32"] = 0
    rng.bit_generator.state = state


def _rows_per_process(batch_size: int, process_index: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        below = batch_size - batch_size % process_count
        near = (f"{below} or " if below > 0 else "") + str(max(below, 0) + process_count)
        raise UsageError(
            f"batch_size={batch_size} does not divide over {process_count} processes. Take {near}."
        )
    if not 0 <= process_index < process_count:
        raise UsageError(f"process_index={process_index} is not one of {process_count} processes.")
    return batch_size // process_count


def _in_threads(count: int, batch: Callable[[int], Batch], threads: int, prefetch: int) -> Iterator[Batch]:
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch if threads else 0)
    return iter(grain.MapDataset.range(count).map(batch).to_iter_dataset(options))
