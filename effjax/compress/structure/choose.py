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
from effjax.compress.structure.scores import Scores
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
      heads, qk, value, hidden: units that stay.
      head_step, qk_step, value_step, hidden_step: units of a layer that go together; the number that is left
        is a multiple of it.
    """

    heads: int = 1
    qk: int = 4
    value: int = 4
    hidden: int = 8
    head_step: int = 1
    qk_step: int = 4
    value_step: int = 4
    hidden_step: int = 8

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
    has = [dataclasses.asdict(sizes(layer)) for layer in layers]
    ranks = {at: np.argsort(np.asarray(worth), axis=-1, kind="stable") for at, worth in scores.items()}
    total = sum(cost.of(Sizes(**own)) for cost, own in zip(costs, has, strict=True))
    waiting: list[tuple[float, int, Kind]] = []

    def offer(at: int, kind: Kind) -> None:
        step, left = least.step(kind), has[at][kind]
        goes = left % step or step
        if left - goes < max(getattr(least, kind), 1):
            return
        gone = scores[at, kind].shape[-1] - left
        worth = np.take_along_axis(np.asarray(scores[at, kind]), ranks[at, kind], axis=-1)
        lost = float(worth[..., gone : gone + goes].sum())
        saved = _saved(costs[at], has[at], kind, goes)
        if order == "worth_per_cost" and saved > 0:
            lost /= saved
        elif order == "worth_less_cost":
            lost -= price * saved
        heapq.heappush(waiting, (lost, at, kind))

    for at, kind in scores:
        offer(at, kind)
    while total > budget and waiting:
        _, at, kind = heapq.heappop(waiting)
        goes = has[at][kind] % least.step(kind) or least.step(kind)
        total -= _saved(costs[at], has[at], kind, goes)
        has[at][kind] -= goes
        offer(at, kind)
    if total > budget:
        raise UsageError(
            f"a budget of {budget:.4g} cannot be met: {total:.4g} are left where every layer keeps {least}. "
            f"Let other kinds of units go, or fewer stay."
        )
    return {
        (at, kind): np.sort(order[..., order.shape[-1] - has[at][kind] :], axis=-1)
        for (at, kind), order in ranks.items()
    }


def narrowed(layers: Sequence[Layer], stay: Mapping[tuple[int, Kind], np.ndarray]) -> list[Layer]:
    """The layers with these units alone."""
    made = list(layers)
    # Channels first: their numbers are of the heads that there were.
    for kind in ("qk", "value", "heads", "hidden"):
        for at, layer in enumerate(made):
            units = stay.get((at, kind))  # type: ignore[call-overload]
            if units is None or units.shape[-1] == getattr(sizes(layer), kind):
                continue
            made[at] = keep(layer, kind, units)  # type: ignore[arg-type]
    return made


def _saved(cost: Price, has: Mapping[str, int], kind: Kind, count: int) -> float:
    fewer = {**has, kind: has[kind] - count}
    return cost.of(Sizes(**has)) - cost.of(Sizes(**fewer))
