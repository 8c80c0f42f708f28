"""What a layer costs with any number of units, in multiply-accumulates an example.

    MACs(h, d, e, m) = a + h (b + c d + c' e) + g m

of h heads, d channels of queries and keys, e channels of values, m hidden units.

The five numbers of a layer follow from counting its network with a unit less of each kind; attention and
feed-forward layers are exactly of this form. What is equal in several layers is counted once. Each of the
numbers is linear in the width of the stream, and follows from counting at two widths.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from effjax.compress.structure.layers import Layer, put_together, take_apart
from effjax.compress.structure.stream import keep_channels, stream_width
from effjax.compress.structure.units import KINDS, Sizes, apart, keep, sizes
from effjax.compress.subject import Subject
from effjax.measure.cost import count


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """The numbers of a layer.

    Attributes:
      fixed: what it costs whatever it has.
      head: of a head, without channels.
      qk: of a channel of queries and keys of a head.
      value: of a channel of the values of a head.
      hidden: of a hidden unit.
    """

    fixed: float
    head: float = 0.0
    qk: float = 0.0
    value: float = 0.0
    hidden: float = 0.0

    def of(self, has: Sizes) -> float:
        """Of a layer that has so much."""
        each = self.head + self.qk * has.qk + self.value * has.value
        return self.fixed + has.heads * each + self.hidden * has.hidden

    def of_unit(self, kind: str, has: Sizes) -> float:
        """What one unit less saves."""
        if kind == "heads":
            return self.head + self.qk * has.qk + self.value * has.value
        return self.hidden if kind == "hidden" else has.heads * getattr(self, kind)


@dataclasses.dataclass(frozen=True)
class WidthCost:
    """The numbers of a layer at two widths of the stream.

    Attributes:
      wide, narrow: costs.
      channels: of the stream, of both.
    """

    wide: LayerCost
    narrow: LayerCost
    channels: tuple[int, int]

    def of(self, has: Sizes) -> float:
        """Of a layer that has so much."""
        wide, narrow = self.channels
        share = (has.stream - narrow) / (wide - narrow)
        return self.narrow.of(has) + share * (self.wide.of(has) - self.narrow.of(has))


def macs(subject: Subject) -> int:
    """Multiply-accumulates of a pass in evaluation over one example."""
    rows = len(jax.tree.leaves(subject.example)[0])
    batch = {"mask": jnp.ones(rows), **subject.example}
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), batch)
    rest = {name: tree for name, tree in subject.variables.items() if name != "params"}
    forward = lambda params, rest, batch: subject.task.metrics({"params": params, **rest}, batch)  # noqa: E731
    return count(forward, subject.params, rest, shapes).macs


def costs(subject: Subject, layers: Sequence[Layer]) -> tuple[LayerCost, ...]:
    """The numbers of every layer; `fixed` is what of the whole network is left, on the first layer alone.

    Args:
      subject: the network.
      layers: those that it was taken apart into.
    """
    whole = macs(subject)
    known: list[tuple[Layer, LayerCost]] = []
    found = []
    for at, layer in enumerate(layers):
        like = next((cost for other, cost in known if _alike(layer, other)), None)
        if like is None:
            like = _counted(subject, layers, at, whole)
            known.append((layer, like))
        found.append(like)
    rest = float(whole) - sum(cost.of(sizes(layer)) for cost, layer in zip(found, layers, strict=True))
    return (dataclasses.replace(found[0], fixed=rest), *found[1:])


def width_costs(subject: Subject, layers: Sequence[Layer]) -> tuple[WidthCost, ...]:
    """As `costs`, where the stream may lose channels too.

    Raises:
      UsageError: for a network that keeps its stream.
    """
    wide = stream_width(subject)
    narrow = max(wide // 2, 1)
    cut = keep_channels(subject, range(narrow))
    both = zip(costs(subject, layers), costs(cut, take_apart(cut)), strict=True)
    return tuple(WidthCost(*each, (wide, narrow)) for each in both)


def _alike(one: Layer, other: Layer) -> bool:
    return (one.stack, one.block) == (other.stack, other.block)


def _counted(subject: Subject, layers: Sequence[Layer], at: int, whole: int) -> LayerCost:
    layer, has = layers[at], sizes(layers[at])
    saved: dict[str, float] = {}
    for kind in KINDS:
        units = getattr(has, kind)
        if units < 2:  # a kind with one unit cannot lose it
            saved[kind] = 0.0
            continue
        rows = np.tile(np.arange(units - 1), (has.heads, 1)) if apart(layer, kind) else np.arange(units - 1)
        cut = keep(layer, kind, rows)
        saved[kind] = float(whole) - macs(put_together(subject, [*layers[:at], cut, *layers[at + 1 :]]))
    heads = max(has.heads, 1)
    qk, value = saved["qk"] / heads, saved["value"] / heads
    head = saved["heads"] - qk * has.qk - value * has.value if saved["heads"] else 0.0
    return LayerCost(0.0, head, qk, value, saved["hidden"])
