"""AxFormer: parts that the loss can do without go, from whole branches to single heads and hidden units.

    bound = (1 + tolerance) min_t loss_t                over all networks so far, the whole one among them
    a part goes where the loss without it, and without all that went before, is at most the bound

In turn the branches of all layers, heads, and groups of hidden units; of each the loss is first found without
it alone, and those that hurt most go first. Those that are above the bound alone are not tried with others.
As the least loss sinks, so does the bound: it is never above (1 + tolerance) times the loss at the start.

Last, if asked, the deepest layers first: each query sums over the `top` keys with the largest logits alone,
in every layer whose loss is then still within the bound. That brings no time by itself: no kernel here skips
the others.

A trial is the whole network with masks, which are data to one compiled program; what is left at the end is
an ordinary smaller network, without any.

Source: Nagarajan, Sen, Stevens and Raghunathan, "AxFormer: Accuracy-driven Approximation of Transformers for
Faster, Smaller and more Accurate NLP Models", 2020, arXiv:2010.03688.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Array, Int

from effjax.compress.blocks import evaluated
from effjax.compress.structure.cost import macs
from effjax.compress.structure.layers import Layer, put_together, take_apart
from effjax.compress.structure.masks import Part, branches, mask_shape, masked_loss
from effjax.compress.structure.scores import Magnitude, wanted
from effjax.compress.structure.units import keep, without
from effjax.compress.subject import Batch, Calibration, Subject
from effjax.errors import UsageError
from effjax.mixers.attention import Attention

Tier = Literal["branches", "heads", "hidden"]
Masks = dict[tuple[int, Part], np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Element:
    """What goes at once.

    Attributes:
      layer: number of the layer.
      part: the branch, or the kind of its units.
      units: numbers; none of a branch.
    """

    layer: int
    part: Part
    units: Int[np.ndarray, " k"] | None = None

    def removed(self, masks: Masks) -> Masks:
        """The masks without it."""
        own = masks[self.layer, self.part].copy()
        own[() if self.units is None else self.units] = 0
        return {**masks, (self.layer, self.part): own}


@dataclasses.dataclass(frozen=True)
class AxFormer:
    """Takes out what the loss does not need.

    Attributes:
      tolerance: by how much of the least loss so far the loss may rise.
      tiers: what is tried, in order.
      group: hidden units that go at once, the ones with the least norms together.
      batches: of training data that the loss is of.
      top: keys of a query that count in layers that can do without the others; None leaves attention alone.
    """

    tolerance: float = 0.05
    tiers: tuple[Tier, ...] = ("branches", "heads", "hidden")
    group: int = 16
    batches: int = 8
    top: int | None = None

    def __post_init__(self) -> None:
        least = min(self.group, self.batches, 1 if self.top is None else self.top)
        if self.tolerance < 0 or least < 1 or not self.tiers:
            raise UsageError(
                f"tolerance={self.tolerance} is not negative, group={self.group}, batches={self.batches} and "
                f"top={self.top} are at least 1, and tiers={self.tiers} names what is tried."
            )

    def apply(self, subject: Subject, calibration: Calibration) -> Subject:
        """Walks all tiers and builds what is left.

        Raises:
          UsageError: for a network whose layers cannot be taken apart, or have nothing that could go.
        """
        layers = take_apart(subject)
        masks = _whole(layers, self.tiers)
        if not masks:
            raise UsageError(f"no layer has any of {', '.join(self.tiers)} to lose.")
        batches = [evaluated(batch) for batch in calibration.first(self.batches)]
        loss = masked_loss(subject, batches)
        norms = Magnitude().score(subject, layers, ("hidden",), calibration)
        bound = Bound(loss(masks), self.tolerance)
        for tier in self.tiers:
            elements = self._elements(layers, masks, tier, norms)
            masks, gone = walked(masks, elements, loss, bound)
            told = f"loss {bound.now:.4f}, {bound.start:.4f} at the start."
            calibration.report(f"{tier}: {gone} of {len(elements)} gone; {told}")
        small = put_together(subject, built(layers, masks))
        if self.top is not None:
            small, hard = hardened(small, self.top, bound, batches)
            told = f"loss {bound.now:.4f}, {bound.start:.4f} at the start."
            calibration.report(f"hard attention in layers {hard}; {told}")
        calibration.report(f"{macs(small) / macs(subject):.4f} of the MACs left.")
        return small

    def _elements(
        self, layers: Sequence[Layer], masks: Masks, tier: Tier, norms: Mapping[Any, Array]
    ) -> list[Element]:
        """What may go of all branches that are still there: of layers that are alike, the deepest first."""
        places = [(at, part) for at, part in masks if _tier(part) == tier and _there(masks, at, part)]
        places.sort(key=lambda place: -place[0])
        if tier == "branches":
            return [Element(at, part) for at, part in places]
        made = []
        for at, part in places:
            count, size = len(masks[at, part]), self.group if part == "hidden" else 1
            order = np.argsort(norms[at, "hidden"]) if part == "hidden" else np.arange(count)
            made += [Element(at, part, order[i : i + size]) for i in range(0, count, size)]
        return made


class Bound:
    """What the loss may not be above, and what it was.

    Attributes:
      start: of the whole network.
      now: of the network as it is.
      least: so far.
    """

    def __init__(self, start: float, tolerance: float) -> None:
        self.start = self.now = self.least = start
        self._tolerance = tolerance

    @property
    def most(self) -> float:
        """The bound."""
        return self.least + self._tolerance * abs(self.least)

    def takes(self, loss: float) -> bool:
        """Whether a loss is within the bound, which it then moves."""
        if not loss <= self.most:  # nor is what is no number
            return False
        self.now, self.least = loss, min(self.least, loss)
        return True


def walked(
    masks: Masks, elements: Sequence[Element], loss: Callable[[Masks], float], bound: Bound
) -> tuple[Masks, int]:
    """Masks without the elements that the loss can do without, and how many these are.

    Args:
      masks: of what is still there.
      elements: of one tier.
      loss: of masks.
      bound: of the loss; it moves.
    """
    alone = np.array([loss(element.removed(masks)) for element in elements])
    gone, hopeful = 0, alone <= bound.most
    for number in np.argsort(alone, kind="stable")[: hopeful.sum()]:
        element = elements[number]
        tried = element.removed(masks)
        last = element.units is not None and not tried[element.layer, element.part].any()
        if not last and bound.takes(loss(tried)):
            masks, gone = tried, gone + 1
    return masks, gone


def built(layers: Sequence[Layer], masks: Masks) -> list[Layer]:
    """The layers really without what masks leave out.

    Args:
      layers: whole.
      masks: zeros and ones.
    """
    made = list(layers)
    for (at, part), mask in masks.items():
        if part in ("mixer", "ffn"):
            made[at] = made[at] if mask.all() else without(made[at], part)
        elif _there(masks, at, part) and not mask.all():
            made[at] = keep(made[at], part, np.flatnonzero(mask))  # type: ignore[arg-type]
    return made


def hardened(subject: Subject, top: int, bound: Bound, batches: Sequence[Batch]) -> tuple[Subject, list[int]]:
    """The network whose queries sum over few keys where the loss allows, and the numbers of these layers.

    Args:
      subject: the network.
      top: keys of a query.
      bound: of the loss; it moves.
      batches: that the loss is of, as `evaluated` gives them.
    """
    found: list[int] = []
    for at, layer in reversed(list(enumerate(take_apart(subject)))):
        mixer = getattr(layer.block, "mixer", None)
        if type(mixer) is not Attention:
            continue
        hard: dict[str, Any] = {"mixer": mixer.clone(top=top, parent=None, name=None)}
        block = layer.block.clone(**hard, parent=None, name=None)
        layers = list(take_apart(subject))
        layers[at] = dataclasses.replace(layer, block=block)
        tried = put_together(subject, layers)
        if bound.takes(masked_loss(tried, batches)({})):
            subject, found = tried, [at, *found]
    return subject, found


def _whole(layers: Sequence[Layer], tiers: Sequence[Tier]) -> Masks:
    """Ones for all that may go."""
    places: list[tuple[int, Part]] = []
    if "branches" in tiers:
        places += [(at, branch) for at, layer in enumerate(layers) for branch in branches(layer)]
    kinds: tuple[Literal["heads", "hidden"], ...] = ("heads", "hidden")
    for kind in kinds:
        if kind in tiers:
            places += [(at, kind) for at, _ in wanted(layers, (kind,))]
    return {(at, part): np.ones(mask_shape(layers[at], part), np.float32) for at, part in places}


def _tier(part: Part) -> Tier:
    return part if part in ("heads", "hidden") else "branches"  # type: ignore[return-value]


def _there(masks: Masks, at: int, part: Part) -> bool:
    """Whether the branch that a part is of has not gone."""
    branch: Part = "mixer" if part in ("mixer", "heads") else "ffn"
    return (at, branch) not in masks or bool(masks[at, branch].all())
