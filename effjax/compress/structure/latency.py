"""What a layer takes in time with any number of units, measured on this device.

A table of one layer, run alone on what enters it in the network, at a grid of sizes; between them the times
are interpolated linearly in every direction. Layers of a stack are alike, so that one table is for all.

Yang et al. 2023, arXiv:2110.04869 (NViT): a table over widths, heads, channels and hidden units of DeiT.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from scipy.interpolate import RegularGridInterpolator

from effjax.compress.blocks import found_in
from effjax.compress.structure.layers import Layer, take_apart
from effjax.compress.structure.stream import keep_channels, stream_width
from effjax.compress.structure.units import Kind, Sizes, apart, keep, sizes
from effjax.compress.subject import Batch, Subject
from effjax.errors import UsageError
from effjax.measure.latency import compare


@dataclasses.dataclass(frozen=True, eq=False)
class LayerTimes:
    """Times of a layer at a grid of sizes.

    Attributes:
      kinds: of units along the axes of the grid.
      points: how many units, rising, along each axis.
      seconds: `[*points]`.
    """

    kinds: tuple[Kind, ...]
    points: tuple[tuple[int, ...], ...]
    seconds: np.ndarray

    def of(self, has: Sizes) -> float:
        """Seconds of a layer that has so much."""
        at = [getattr(has, kind) for kind in self.kinds]
        return float(RegularGridInterpolator(self.points, self.seconds)(at)[0])


def measured(
    subject: Subject, layers: Sequence[Layer], kinds: Sequence[Kind], batch: Batch, repeats: int = 20
) -> LayerTimes:
    """Times a layer of a network.

    Args:
      subject: a network of one stack of equal layers.
      layers: those that it was taken apart into.
      kinds: units that it may lose, and whether its stream may.
      batch: what enters the network.
      repeats: rounds; the median counts.

    Raises:
      UsageError: for layers that differ.
    """
    first = layers[0]
    if any(layer.block != first.block or layer.stack for layer in layers):
        raise UsageError("a table of times is of one stack of equal layers: choose a budget of MACs.")
    has = sizes(first)
    if "stream" in kinds:
        has = dataclasses.replace(has, stream=stream_width(subject))
    own = tuple(kind for kind in kinds if getattr(has, kind))
    points = tuple(_points(getattr(has, kind)) for kind in own)
    ways: dict[str, Callable[[], Any]] = {}
    widths: Sequence[int | None] = points[own.index("stream")] if "stream" in own else (None,)
    at_width = {width: _first(subject, width, batch) for width in widths}
    for numbers in itertools.product(*points):
        left = dict(zip(own, numbers, strict=True))
        layer, run = at_width[left.pop("stream", None)]
        ways[str(numbers)] = run(_cut(layer, left))
    timed = compare(ways, [()], repeats=repeats, costs={})
    seconds = [timed.timings[name].median for name in ways]
    return LayerTimes(own, points, np.asarray(seconds).reshape([len(axis) for axis in points]))


def _first(
    subject: Subject, channels: int | None, batch: Batch
) -> tuple[Layer, Callable[[Layer], Callable[[], Any]]]:
    """The first layer in a stream of so many channels, and how layers like it run on what enters it."""
    network = subject if channels is None else keep_channels(subject, range(channels))
    (blocks, entered), *_ = found_in(network, [batch])
    each = jax.tree.map(lambda leaf: leaf[0, 0], entered.each)
    x, shared = jax.tree.map(lambda leaf: leaf[0], (entered.x, entered.shared))

    def runner(layer: Layer) -> Callable[[], Any]:
        run = jax.jit(
            lambda variables, x: layer.block.apply(
                variables, x, each, *shared, method=blocks.method, train=False
            )
        )
        return functools.partial(run, layer.variables, x)

    return take_apart(network)[0], runner


def _points(count: int) -> tuple[int, ...]:
    """1, a quarter, a half and all."""
    return tuple(sorted({1, max(count // 4, 1), max(count // 2, 1), count}))


def _cut(layer: Layer, numbers: dict[Kind, int]) -> Layer:
    """The layer with the first so many units of each kind."""
    for kind in ("qk", "value", "heads", "hidden"):
        count = numbers.get(kind)  # type: ignore[call-overload]
        if count is not None:
            rows = np.arange(count)
            many = apart(layer, kind)  # type: ignore[arg-type]
            layer = keep(layer, kind, np.tile(rows, (sizes(layer).heads, 1)) if many else rows)  # type: ignore[arg-type]
    return layer
