"""Recovery as a step: the network that the recipe began with teaches what it has become."""

import dataclasses

from effjax.compress.recovery import Recovery, recovered
from effjax.compress.subject import Calibration, Subject


@dataclasses.dataclass(frozen=True)
class Recover:
    """Trains the network for a while.

    Attributes:
      how: how long, and how.
    """

    how: Recovery = dataclasses.field(default_factory=Recovery)

    def apply(self, subject: Subject, calibration: Calibration) -> Subject:
        """Trains.

        Raises:
          UsageError: for kernels in codes, or a loss that is not finite.
        """
        return recovered(subject, calibration.original, calibration, self.how)
