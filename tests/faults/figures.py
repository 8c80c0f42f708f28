"""What a fault was tried on, and what came of it."""

import collections
import dataclasses


@dataclasses.dataclass
class Figures:
    """Of one kind of fault.

    Attributes:
      fault: what was done.
      outcomes: how often each thing came of it.
      failures: what must not happen, a sentence each.
    """

    fault: str
    outcomes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    failures: list = dataclasses.field(default_factory=list)

    def expect(self, holds, otherwise):
        """Notes a failure where something does not hold."""
        if not holds:
            self.failures.append(otherwise)

    def __str__(self):
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(self.outcomes.items()))
        return f"{self.fault}: {counts or 'nothing was tried'}; {len(self.failures)} failures"
