"""A recipe: steps that make a trained network smaller, one after the other."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

from effjax.compress.steps import kinds as steps
from effjax.compress.subject import Calibration, Subject
from effjax.config import build
from effjax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a recipe's config says.

    Attributes:
      steps: of `effjax.compress.steps`, in order.
      seed: of everything random.
    """

    steps: tuple[Any, ...] = dataclasses.field(metadata={"kinds": steps.KINDS})
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.steps:
            raise UsageError("a recipe has at least one step.")

    def apply(self, subject: Subject, calibration: Calibration) -> Subject:
        """Takes all steps."""
        *_, (_, subject) = self.each(subject, calibration)
        return subject

    def each(
        self, original: Subject, calibration: Calibration, taken: tuple[int, Subject] | None = None
    ) -> Iterator[tuple[int, Subject]]:
        """Takes one step after the other.

        Args:
          original: the network before the first.
          calibration: what the steps may look at.
          taken: how many have been taken before, and what they left; None is none.

        Yields:
          How many are taken, and what they left.
        """
        before, subject = taken or (0, original)
        calibration = dataclasses.replace(calibration, original=original)
        for number, step in enumerate(self.steps[before:], before):
            if len(self.steps) > 1:
                calibration.report(f"{type(step).__name__}, step {number + 1} of {len(self.steps)}.")
            key = jax.random.fold_in(jax.random.fold_in(calibration.key, self.seed), number)
            subject = step.apply(subject, dataclasses.replace(calibration, key=key))
            yield number + 1, subject


def read(config: Any) -> Recipe:
    """Resolves a recipe's config.

    Raises:
      UsageError: naming the full path of what is wrong.
    """
    return build(Recipe, config, "recipe")
