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
from effjax.compress.structure.layers import Layer
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
      kinds: units that it may lose.
      batch: what enters the network.
      repeats: rounds; the median counts.

    Raises:
      UsageError: for layers that differ.
    """
    first = layers[0]
    if any(layer.block != first.block or layer.stack for layer in layers):
        raise UsageError("a table of times is of one stack of equal layers: choose a budget of MACs.")
    (blocks, entered), *_ = found_in(subject, [batch])
    each = jax.tree.map(lambda leaf: leaf[0, 0], entered.each)
    x, shared = jax.tree.map(lambda leaf: leaf[0], (entered.x, entered.shared))
    own = tuple(kind for kind in kinds if getattr(sizes(first), kind))
    points = tuple(_points(getattr(sizes(first), kind)) for kind in own)
    ways: dict[str, Callable[[Any], Any]] = {}
    for numbers in itertools.product(*points):
        cut = _cut(first, dict(zip(own, numbers, strict=True)))
        ways[str(numbers)] = functools.partial(_runner(cut, blocks.method, each, shared), cut.variables)
    timed = compare(ways, [(x,)], repeats=repeats, costs={})
    seconds = [timed.timings[name].median for name in ways]
    return LayerTimes(own, points, np.asarray(seconds).reshape([len(axis) for axis in points]))


def _runner(layer: Layer, method: str, each: Any, shared: Any) -> Callable[[Any, Any], Any]:
    """The layer alone, of its variables and what enters it."""
    return jax.jit(
        lambda variables, x: layer.block.apply(variables, x, each, *shared, method=method, train=False)
    )


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
