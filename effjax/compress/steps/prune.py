"""Structured pruning as a step: units go until a budget is met.

    remove the units with the least worth, by itself or for what it saves, while the cost is above the budget

What is left is an ordinary network with narrower layers. Where it goes in `rounds`, worth is measured again
after each, and the network may be trained in between.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from effjax.compress.recovery import Recovery, recovered
from effjax.compress.structure.choose import Least, Order, Price, kept, narrowed
from effjax.compress.structure.cost import costs, macs, width_costs
from effjax.compress.structure.latency import LayerTimes, measured
from effjax.compress.structure.layers import Layer, put_together, take_apart
from effjax.compress.structure.score_kinds import KINDS as SCORES
from effjax.compress.structure.scores import EVERYWHERE, Taylor
from effjax.compress.structure.stream import keep_channels, stream_width
from effjax.compress.structure.units import Sizes, sizes
from effjax.compress.subject import Calibration, Subject
from effjax.config import part
from effjax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Prune:
    """Takes units out of all layers at once.

    Attributes:
      left: share of the cost that is left.
      cost: multiply-accumulates of the whole network, or seconds of its layers, measured on this device.
      score: what units are worth, a kind in `effjax.compress.structure.score_kinds`.
      kinds: what may go: heads, channels of queries and keys, channels of values, hidden units, and channels
        of the stream, which go out of all layers at once.
      least: what every layer keeps, and how many units go together.
      order: whether worth is weighed against the cost that is saved.
      price: of what is saved, with `order="worth_less_cost"`.
      rounds: in how many parts the units go, each as large a share of what is left.
      tune: training after every round but the last; None goes on at once.
    """

    left: float = 0.5
    cost: Literal["macs", "seconds"] = "macs"
    score: Any = part(SCORES, default=Taylor)
    kinds: tuple[Literal["heads", "qk", "value", "hidden", "stream"], ...] = ("heads", "hidden")
    least: Least = dataclasses.field(default_factory=Least)
    order: Order = "worth_per_cost"
    price: float = 0.0
    rounds: int = 1
    tune: Recovery | None = None

    def __post_init__(self) -> None:
        if not 0 < self.left <= 1 or self.rounds < 1 or not self.kinds:
            raise UsageError(
                f"left={self.left} is a share above 0 and at most 1, rounds={self.rounds} at least 1, and "
                f"kinds={self.kinds} names what may go."
            )

    def apply(self, subject: Subject, calibration: Calibration) -> Subject:
        """Prunes.

        Raises:
          UsageError: for a network whose layers cannot be taken apart, or a budget that cannot be met.
        """
        whole = macs(subject)
        layers = take_apart(subject)
        table = None
        if self.cost == "seconds":
            table = measured(subject, layers, self.kinds, calibration.first(1)[0])
            slow, fast = table.seconds.max(), table.seconds.min()
            calibration.report(f"a layer takes {slow:.3g} s, and {fast:.3g} at least.")
        prices = self._prices(subject, layers, table)
        cost = sum(price.of(has) for price, has in zip(prices, self._sizes(subject, layers), strict=True))
        for number in range(1, self.rounds + 1):
            scores = self.score.score(subject, layers, self.kinds, calibration)
            if not scores:
                raise UsageError(f"no layer has any of {', '.join(self.kinds)} to lose.")
            budget = self.left ** (number / self.rounds) * cost
            stay = kept(layers, scores, prices, budget, self.least, self.order, self.price)
            channels = stay.pop((EVERYWHERE, "stream"), None)
            if channels is not None and len(channels) < subject.model.dim:
                subject = keep_channels(subject, channels)
                layers = take_apart(subject)
            subject = put_together(subject, narrowed(layers, stay))
            left = macs(subject) / whole
            calibration.report(f"round {number} of {self.rounds}: {left:.4f} of the MACs left.")
            if number < self.rounds:
                if self.tune is not None:
                    subject = recovered(subject, calibration.original, calibration, self.tune)
                layers = take_apart(subject)
                prices = self._prices(subject, layers, table)
        return subject

    def _prices(self, subject: Subject, layers: Sequence[Layer], table: LayerTimes | None) -> Sequence[Price]:
        if table is not None:
            return [table] * len(layers)
        return width_costs(subject, layers) if "stream" in self.kinds else costs(subject, layers)

    def _sizes(self, subject: Subject, layers: Sequence[Layer]) -> list[Sizes]:
        channels = stream_width(subject) if "stream" in self.kinds else 0
        return [dataclasses.replace(sizes(layer), stream=channels) for layer in layers]
