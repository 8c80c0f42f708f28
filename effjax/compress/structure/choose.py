"""Which units go, so that a network costs no more than a budget.

Units of a layer go in the order of their worth, so many at a time; over all layers and kinds, what is worth
least of all goes first, by itself or for what it saves. Of channels each head loses its own.
"""

import dataclasses
import heapq
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from effjax.compress.structure.layers import Layer
from effjax.compress.structure.scores import EVERYWHERE, Scores
from effjax.compress.structure.units import Kind, Sizes, keep, sizes
from effjax.errors import UsageError

Order = Literal["worth", "worth_per_cost", "worth_less_cost"]


@runtime_checkable
class Price(Protocol):
    """What a layer costs, in any unit."""

    def of(self, has: Sizes) -> float:
        """Of a layer that has so much."""


@dataclasses.dataclass(frozen=True)
class Least:
    """What every layer keeps at least, and how many units go at a time.

    Attributes:
      heads, qk, value, hidden, stream: units that stay.
      head_step, qk_step, value_step, hidden_step, stream_step: units of a layer, or channels of the stream,
        that go together; the number that is left is a multiple of it.
    """

    heads: int = 1
    qk: int = 4
    value: int = 4
    hidden: int = 8
    head_step: int = 1
    qk_step: int = 4
    value_step: int = 4
    hidden_step: int = 8
    stream: int = 8
    stream_step: int = 8

    def step(self, kind: Kind) -> int:
        """How many go together."""
        return getattr(self, f"{'head' if kind == 'heads' else kind}_step")  # type: ignore[no-any-return]


def kept(
    layers: Sequence[Layer],
    scores: Scores,
    costs: Sequence[Price],
    budget: float,
    least: Least,
    order: Order = "worth_per_cost",
    price: float = 0.0,
) -> dict[tuple[int, Kind], np.ndarray]:
    """The units that stay, of every layer and kind that was scored: the fewest that have to go.

    What a unit saves depends on how many others there are, and is looked at again when its turn comes.

    Args:
      layers: of the network.
      scores: of their units.
      costs: of the layers.
      budget: of the whole network, in the unit of the costs.
      least: what stays in any case.
      order: what goes first: what is worth least, for each cost that it saves, or less `price` times that.
      price: of what is saved, in worth.

    Raises:
      UsageError: for a budget that cannot be met.
    """
    channels = scores[EVERYWHERE, "stream"].shape[-1] if (EVERYWHERE, "stream") in scores else 0
    has = [dataclasses.replace(sizes(layer), stream=channels) for layer in layers]
    ranks = {at: np.argsort(np.asarray(worth), axis=-1, kind="stable") for at, worth in scores.items()}
    total = sum(cost.of(own) for cost, own in zip(costs, has, strict=True))
    waiting: list[tuple[float, int, Kind]] = []

    def next_to_go(at: int, kind: Kind) -> int:
        left = getattr(has[at], kind)
        goes = left % least.step(kind) or least.step(kind)
        return goes if left - goes >= max(getattr(least, kind), 1) else 0

    def without(at: int, kind: Kind) -> dict[int, Sizes]:
        """The layers that change when the next units go."""
        those = range(len(has)) if at == EVERYWHERE else [at]
        goes = next_to_go(at, kind)
        return {i: dataclasses.replace(has[i], **{kind: getattr(has[i], kind) - goes}) for i in those}

    def saved(at: int, kind: Kind) -> float:
        return sum(costs[i].of(has[i]) - costs[i].of(less) for i, less in without(at, kind).items())

    def offered(at: int, kind: Kind) -> float:
        gone = scores[at, kind].shape[-1] - getattr(has[at], kind)
        worth = np.take_along_axis(np.asarray(scores[at, kind]), ranks[at, kind], axis=-1)
        lost = float(worth[..., gone : gone + next_to_go(at, kind)].sum())
        saving = saved(at, kind)
        if order == "worth_per_cost" and saving > 0:
            return lost / saving
        return lost - price * saving if order == "worth_less_cost" else lost

    for at, kind in scores:
        if next_to_go(at, kind):
            heapq.heappush(waiting, (offered(at, kind), at, kind))
    while total > budget and waiting:
        before, at, kind = heapq.heappop(waiting)
        now = offered(at, kind)
        if now > before and waiting and now > waiting[0][0]:
            heapq.heappush(waiting, (now, at, kind))
            continue
        total -= saved(at, kind)
        for i, less in without(at, kind).items():
            has[i] = less
        if next_to_go(at, kind):
            heapq.heappush(waiting, (offered(at, kind), at, kind))
    if total > budget:
        raise UsageError(
            f"a budget of {budget:.4g} cannot be met: {total:.4g} are left where every layer keeps {least}. "
            f"Let other kinds of units go, or fewer stay."
        )
    return {
        (at, kind): np.sort(order[..., order.shape[-1] - getattr(has[at], kind) :], axis=-1)
        for (at, kind), order in ranks.items()
    }


def narrowed(layers: Sequence[Layer], stay: Mapping[tuple[int, Kind], np.ndarray]) -> list[Layer]:
    """The layers with these units alone; the stream is not theirs to cut."""
    made = list(layers)
    # Channels first: their numbers are of the heads that there were.
    for kind in ("qk", "value", "heads", "hidden"):
        for at, layer in enumerate(made):
            units = stay.get((at, kind))  # type: ignore[call-overload]
            if units is None or units.shape[-1] == getattr(sizes(layer), kind):
                continue
            made[at] = keep(layer, kind, units)  # type: ignore[arg-type]
    return made
