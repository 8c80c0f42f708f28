"""What a data set is here: examples by number, some of which may be broken.

A source is anything with a length and `source[i] -> dict`. This file holds that contract and the two
wrappers every source goes through: one that steps over broken records and one that keeps decoded examples in
memory.
"""

import dataclasses
import threading
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from absl import logging

from effjax.errors import RunError, UsageError

# Field name to array, number, or (for text that is still to be tokenised) bytes.
Example = dict[str, Any]
# Field name to array whose first axis is the batch.
Batch = dict[str, np.ndarray]


@runtime_checkable
class Examples(Protocol):
    """Random access to examples; safe to call from several threads."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What a task may want to know of a data set before it reads any of it.

    Fields: `class_names` of the field `label` (empty where there are no classes), the `image_shape`
    `(height, width, channels)` before any transform (None where it varies), and the `identity`, a text that
    changes when the data do (empty where nobody can tell).
    """

    class_names: tuple[str, ...] = ()
    image_shape: tuple[int, int, int] | None = None
    identity: str = dataclasses.field(default="", compare=False, repr=False)

    @property
    def num_classes(self) -> int | None:
        """How many classes `label` has; None where there are none."""
        return len(self.class_names) or None


class BadRecord(Exception):
    """One record cannot be read; the message names it. Sources raise it, `Readable` handles it."""


class Readable:
    """A source whose broken records are replaced by the next readable one, up to a set share.

    The replacement depends on the index alone, so the order of an epoch stays a function of the seed. Each
    broken record is counted once, however often it is met.

    Args:
      source: what to read.
      max_bad_share: the share of the records, in [0, 1], that may be broken.
    """

    def __init__(self, source: Examples, max_bad_share: float):
        self._source = source
        self._max_bad_share = max_bad_share
        self._bad: dict[int, str] = {}
        self._lock = threading.Lock()

    @property
    def bad(self) -> Mapping[int, str]:
        """The broken records met so far, by index, each with what is wrong with it."""
        return dict(self._bad)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        """Raises RunError once more than the set share of the records is broken."""
        try:
            return self._source[index]
        except BadRecord as error:
            self._note(index, error)
        for candidate in range(index + 1, index + len(self)):
            candidate %= len(self)
            if candidate in self._bad:
                continue
            try:
                return self._source[candidate]
            except BadRecord as error:
                self._note(candidate, error)
        raise RunError(f"None of the {len(self)} records can be read; the first fault: {self._bad[index]}.")

    def _note(self, index: int, error: BadRecord) -> None:
        with self._lock:
            met_before = index in self._bad
            self._bad[index] = str(error)
            bad = list(self._bad.values())
        if not met_before:
            logging.warning("Broken record %d, stepped over: %s", index, error)
        if len(bad) > self._max_bad_share * len(self):
            named = "\n".join(f"  {fault}" for fault in bad[:10]) + ("\n  ..." if len(bad) > 10 else "")
            raise RunError(
                f"{len(bad)} of {len(self)} records are broken, more than max_bad_share="
                f"{self._max_bad_share:g} allows. Repair or remove them, or allow a larger share:\n{named}"
            )


class Cached:
    """Every example of a small source, decoded once and kept in memory.

    Raises:
      UsageError: if the examples take more than `limit` bytes, found out early from those read so far.
    """

    def __init__(self, source: Examples, limit: int = 2**30):
        self._examples: list[Example] = []
        used = 0
        for index in range(len(source)):
            example = source[index]
            used += sum(_bytes_of(value) for value in example.values())
            expected = used * len(source) / (index + 1)
            if expected > limit and index >= min(100, len(source) - 1):
                raise UsageError(
                    f"cache=True would keep about {expected / 2**20:,.0f} MiB of examples in memory, more "
                    f"than cache_limit allows ({limit / 2**20:,.0f} MiB). Set cache=False, "
                    "or raise cache_limit."
                )
            self._examples.append(example)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]


def _bytes_of(value: Any) -> int:
    return value.nbytes if isinstance(value, np.ndarray) else len(value) if isinstance(value, bytes) else 8
