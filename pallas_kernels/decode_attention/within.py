"""The range of scores in which one number stands for the maximum of all: FlashDecoding++."""

import dataclasses

# Between these e^x is far from the ends of float32: sums of a million products with values stay finite.
LEAST, MOST = -60.0, 60.0


@dataclasses.dataclass(frozen=True)
class Within:
    """Scores x are expected to have low < x - phi < high.

    Attributes:
      phi: what is subtracted from each in place of the maximum.
      low: how far below.
      high: how far above.
    """

    phi: float = 0.0
    low: float = LEAST
    high: float = MOST

    @property
    def middle(self) -> float:
        """Of the interval."""
        return self.phi + (self.low + self.high) / 2

    @property
    def half(self) -> float:
        """Half its length: a score is inside where |x - middle| < half."""
        return (self.high - self.low) / 2
