"""Structured pruning as a step: units go until a budget of multiply-accumulates is met.

    remove the units with the least worth (by itself, or for each MAC that it saves) while MACs > budget

What is left is an ordinary network with narrower layers. Where it goes in `rounds`, worth is measured again
after each, and the network may be trained in between.
"""

import dataclasses
from typing import Any, Literal

from effjax.compress.recovery import Recovery, recovered
from effjax.compress.structure.choose import Least, Order, kept, narrowed
from effjax.compress.structure.cost import costs, macs
from effjax.compress.structure.layers import put_together, take_apart
from effjax.compress.structure.scores import KINDS as SCORES
from effjax.compress.structure.scores import Taylor
from effjax.compress.subject import Calibration, Subject
from effjax.config import part
from effjax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Prune:
    """Takes units out of all layers at once.

    Attributes:
      macs: share of the multiply-accumulates that is left.
      score: what units are worth, a kind in `effjax.compress.structure.scores`.
      kinds: what may go: heads, channels of queries and keys, channels of values, hidden units.
      least: what every layer keeps, and how many units go together.
      order: whether worth is weighed against the MACs that are saved.
      rounds: in how many parts the units go, each as large a share of what is left.
      tune: training after every round but the last; None goes on at once.
    """

    macs: float = 0.5
    score: Any = part(SCORES, default=Taylor)
    kinds: tuple[Literal["heads", "qk", "value", "hidden"], ...] = ("heads", "hidden")
    least: Least = dataclasses.field(default_factory=Least)
    order: Order = "worth_per_mac"
    rounds: int = 1
    tune: Recovery | None = None

    def __post_init__(self) -> None:
        if not 0 < self.macs <= 1 or self.rounds < 1 or not self.kinds:
            raise UsageError(
                f"macs={self.macs} is a share above 0 and at most 1, rounds={self.rounds} at least 1, and "
                f"kinds={self.kinds} names what may go."
            )

    def apply(self, subject: Subject, calibration: Calibration) -> Subject:
        """Prunes.

        Raises:
          UsageError: for a network whose layers cannot be taken apart, or a budget that cannot be met.
        """
        whole = macs(subject)
        for number in range(1, self.rounds + 1):
            share = self.macs ** (number / self.rounds)
            layers = take_apart(subject)
            scores = self.score.score(subject, layers, self.kinds, calibration)
            if not scores:
                raise UsageError(f"no layer has any of {', '.join(self.kinds)} to lose.")
            stay = kept(layers, scores, costs(subject, layers), share * whole, self.least, self.order)
            subject = put_together(subject, narrowed(layers, stay))
            calibration.report(
                f"round {number} of {self.rounds}: {macs(subject) / whole:.4f} of the MACs left."
            )
            if self.tune is not None and number < self.rounds:
                subject = recovered(subject, calibration.original, calibration, self.tune)
        return subject
