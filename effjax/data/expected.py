"""What a data set holds, said in the config, so that a run can be planned where the data is not.

data=dict(
    source=dict(kind="tfds", name="imagenet_latents"),
    expected=dict(examples=1_281_167, fields=dict(image=dict(shape=(32, 32, 4)), label=dict(dtype="int64"))),
)
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from effjax.data.records import Batch, Example
from effjax.errors import UsageError

# Stands in for a side that differs from picture to picture.
_SIDE = 256


@runtime_checkable
class Described(Protocol):
    """What a program needs to know of its data: shapes and a count. Data that is absent has them too."""

    @property
    def num_examples(self) -> int | None:
        """Examples of one epoch; None where that is not known."""

    def example_batch(self, rows: int | None = None) -> Batch:
        """Zeros with the shapes and types of a training batch."""


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of an example, before any transform.

    Args:
      shape: with None for a side that differs between examples.
      dtype: as numpy writes it.
    """

    shape: tuple[int | None, ...] = ()
    dtype: str = "float32"

    def __post_init__(self) -> None:
        try:
            np.dtype(self.dtype)
        except TypeError:
            raise UsageError(
                f"dtype={self.dtype!r} is no type that numpy knows: write float32, uint8, int64."
            ) from None

    def zeros(self) -> np.ndarray:
        """A stand-in for one example's field."""
        return np.zeros([_SIDE if side is None else side for side in self.shape], self.dtype)

    def fits(self, value: Any) -> bool:
        """Whether a field that was read is as expected."""
        value = np.asarray(value)
        sides = zip(self.shape, value.shape, strict=False)
        return (
            value.dtype.kind == np.dtype(self.dtype).kind
            and len(self.shape) == value.ndim
            and all(expected in (None, side) for expected, side in sides)
        )


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a source is expected to hold.

    Args:
      examples: of one epoch (rows, where text is packed); None leaves it open.
      fields: by name; needed unless text is packed, whose rows follow from the packing.
    """

    examples: int | None = None
    fields: Mapping[str, Field] = dataclasses.field(default_factory=dict)

    def example(self) -> Example:
        """An example of zeros."""
        return {name: field.zeros() for name, field in self.fields.items()}

    def check(self, example: Example) -> None:
        """Compares with an example that was read.

        Raises:
          UsageError: naming the first field that differs.
        """
        for name, field in self.fields.items():
            found = np.asarray(example[name]) if name in example else None
            if found is None or not field.fits(found):
                what = "nothing" if found is None else f"{found.shape} {found.dtype}"
                raise UsageError(
                    f"config.data.expected.fields.{name} says {field.shape} {field.dtype}, and the source "
                    f"has {what}: correct whichever is wrong."
                )
