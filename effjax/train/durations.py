"""How long: a number and a unit, as in `"90 epochs"`, `"5000 steps"`, `"1.28M examples"` or `"5%"`.

A config says every length this way. The unit is always written, since a bare 300 is epochs to one reader and
steps to the next, and the string survives a change of batch size, which is what it is for.
"""

import dataclasses
import re
from fractions import Fraction

from effjax.errors import UsageError, did_you_mean

_FORM = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kMGB]?)\s*(%|[a-zA-Z]+)\s*")
_SCALE = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}
_UNITS = ("steps", "epochs", "examples", "%")


@dataclasses.dataclass(frozen=True)
class Duration:
    """An exact amount of one unit: `steps`, `epochs`, `examples` or `%` of the whole run."""

    amount: Fraction
    unit: str


def parse(text: str) -> Duration:
    """Reads a duration.

    >>> parse("1.28M examples")
    Duration(amount=Fraction(1280000, 1), unit='examples')

    Raises:
      UsageError: for anything but a non-negative number, perhaps k, M, G or B, and a known unit.
    """
    found = _FORM.fullmatch(text)
    if found is None:
        raise UsageError(
            f"{text!r} is no duration. Write a number and a unit, such as '90 epochs', '5000 steps', "
            "'1.28M examples' or '5%'."
        )
    number, scale, unit = found.groups()
    plural = unit if unit == "%" or unit.endswith("s") else unit + "s"
    if plural not in _UNITS:
        raise UsageError(f"{text!r}: {unit!r} is no unit of duration. {did_you_mean(unit, _UNITS)}")
    return Duration(Fraction(number) * _SCALE[scale], plural)


def to_steps(
    duration: str, batch_size: int, dataset_size: int | None = None, total_steps: int | None = None
) -> int:
    """Turns a duration into optimiser steps.

        steps: n      examples: n / batch_size      epochs: n * dataset_size / batch_size      %: n * total

    rounded down, and to one step where the duration is positive but shorter. The arithmetic is exact.

    Args:
      duration: as `parse` reads it.
      batch_size: the global batch, in examples a step.
      dataset_size: examples in an epoch; None where that is not known.
      total_steps: the length of the whole run; None while that is what is being asked for.

    Raises:
      UsageError: for text that is no duration, epochs of a data set without a size, or a share of an unknown
        or exceeded whole.
    """
    parsed = parse(duration)
    if parsed.unit == "steps":
        steps = parsed.amount
    elif parsed.unit == "examples":
        steps = parsed.amount / batch_size
    elif parsed.unit == "epochs":
        if dataset_size is None:
            raise UsageError(
                f"{duration!r}: the data set does not say how many examples it has. "
                "Give the duration in steps or examples."
            )
        steps = parsed.amount * dataset_size / batch_size
    else:
        if total_steps is None:
            raise UsageError(
                f"{duration!r} is a share of the whole run and cannot be its length. "
                "Give the length in steps, epochs or examples."
            )
        if parsed.amount > 100:
            raise UsageError(f"{duration!r} is more than the whole run.")
        steps = parsed.amount * total_steps / 100
    return max(int(steps), 1 if parsed.amount > 0 else 0)


@dataclasses.dataclass(frozen=True)
class Budget:
    """The length of a run and what it takes to turn any other duration into steps.

    Attributes:
      total_steps: optimiser steps of the whole run.
      batch_size: the global batch.
      dataset_size: examples in an epoch, or None where that is not known.
    """

    total_steps: int
    batch_size: int = 1
    dataset_size: int | None = None

    @classmethod
    def of(cls, duration: str, batch_size: int, dataset_size: int | None = None) -> "Budget":
        """The budget of a run that lasts `duration`."""
        total = to_steps(duration, batch_size, dataset_size)
        if total == 0:
            raise UsageError(f"{duration!r}: a run must last at least one step.")
        return cls(total, batch_size, dataset_size)

    def steps(self, duration: str) -> int:
        """`to_steps` within this run."""
        return to_steps(duration, self.batch_size, self.dataset_size, self.total_steps)
