"""Takes a network out of one in which it lies, see `effjax.compress.structure.nested`."""

import dataclasses

from effjax.compress.structure.nested import Inner, inner
from effjax.compress.subject import Calibration, Subject


@dataclasses.dataclass(frozen=True)
class Slice(Inner):
    """Leaves the first layers, with the first heads and hidden units of each; nothing is trained."""

    def apply(self, subject: Subject, calibration: Calibration) -> Subject:
        """Slices.

        Raises:
          UsageError: for a network whose layers do not stand for themselves.
        """
        del calibration
        return inner(subject, self)
