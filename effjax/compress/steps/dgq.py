"""DGQ: inputs rounded in groups, along the axis that outliers lie on.

For every kernel the smallest and largest number of each channel, and of each place of the sequence, are found
in one pass. Outliers lie along the axis whose ranges differ more,

    spread = max_i high_i - min_i high_i + max_i low_i - min_i low_i

and that axis is cut into groups of like range, each with a scale and a zero. What has no places (the
condition of a diffusion network) or enters a convolution has one range. Weights are stored by an earlier
step, plainly.

A cut into g groups of indices is the one with the least sum of squared steps, sum_i (high_j(i) - low_j(i))^2,
which is proportional to the expected squared error of rounding: by dynamic programming over the indices in
the order of their size, of their lower, or of their upper end, whichever is best. So the expected error never
grows with g, and g = 1 is one range. The published code takes k-means of (low, high) instead, which
guarantees neither.

Ryu et al., "DGQ: Distribution-Aware Group Quantization for Text-to-Image Diffusion Models", ICLR 2025,
arXiv:2501.04304, and its published code (ugonfor/DGQ). Left out of it: quantisers for every sampling step of
their own. The logarithmic codes of cross-attention are `effjax.mixers.log_weights`.
"""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from effjax.compress.steps.inputs import check_finite, rounded_kernels, with_inputs
from effjax.compress.storage.grouped_inputs import Grouped, Groups
from effjax.compress.storage.inputs import Range, Static
from effjax.compress.storage.trees import replaced, stored_in
from effjax.compress.subject import Calibration, Subject
from effjax.compress.watch import watch
from effjax.errors import UsageError
from effjax.layers.stored import Place


@dataclasses.dataclass(frozen=True)
class Dgq:
    """Rounds what enters kernels that an earlier step stored in a uniform layout, in groups.

    Attributes:
      bits: of a code of what enters.
      groups: of channels or of places.
      kernels: regexps of whole paths.
      leave: regexps of kernels that get what enters as it is, whatever `kernels` says.
      batches: of training data, that are looked at.
      choose: the axis: by the published `spread`, or by the expected `error` of the cuts.
    """

    bits: int = 8
    groups: int = 8
    kernels: tuple[str, ...] = (".*",)
    leave: tuple[str, ...] = ()
    batches: int = 16
    choose: Literal["spread", "error"] = "spread"

    def __post_init__(self) -> None:
        Grouped(self.bits, groups=self.groups)  # which refuses what cannot be
        if self.batches < 1:
            raise UsageError(f"batches={self.batches} must be at least 1.")

    def apply(self, subject: Subject, calibration: Calibration) -> Subject:
        """Looks, chooses and groups.

        Raises:
          UsageError: where no kernel is stored in a uniform layout, for a pattern that matches none, or where
            what enters one is not finite.
        """
        places = rounded_kernels(subject, self.kernels, self.leave)
        seen = watch(subject, places, calibration.first(self.batches), _ends, _wider, entire=True)
        check_finite(seen, lambda told: all(np.isfinite(end).all() for end in told.values()))
        stored, made, axes = stored_in(subject.params), {}, []
        for path, layers in seen.items():
            if any(layer is None for layer in layers):
                calibration.report(f"nothing entered {path}: it gets what enters as it is.")
                continue
            inputs, known = self._grouped(layers, places[path])
            made[path] = with_inputs(stored[path], inputs, known)
            axes.append(inputs.axis if isinstance(inputs, Grouped) else "one range")
        told = ", ".join(f"{axes.count(axis)} by {axis}" for axis in sorted(set(axes)))
        calibration.report(f"what enters {len(made)} kernels is rounded to {self.bits} bits: {told}.")
        return subject.with_params(replaced(subject.params, made))

    def _grouped(self, layers: list[Any], place: Place) -> tuple[Any, Any]:
        """How what enters the kernels of a path is rounded; all layers of a stack share the axis."""
        channels = np.stack([np.stack([layer["low"], layer["high"]]) for layer in layers])  # [L, 2, K]
        if "place_low" not in layers[0] or channels.shape[-1] != place.matrix[0]:
            low, high = channels[:, 0].min(-1), channels[:, 1].max(-1)
            return Static(self.bits), Range(*(_stacked(end, place) for end in (low, high)))
        spots = np.stack(
            [np.stack([layer["place_low"], layer["place_high"]]) for layer in layers]
        )  # [L, 2, T]
        if self.choose == "spread":
            by_channel = sum(spread(low, high) for low, high in channels) > sum(
                spread(low, high) for low, high in spots
            )
        else:
            errors = [
                np.mean([expected_error(low, high, self.groups) for low, high in axis])
                for axis in (channels, spots)
            ]
            by_channel = errors[0] < errors[1]
        chosen = channels if by_channel else spots
        cuts = [cut(low, high, self.groups) for low, high in chosen]
        known = Groups(*(_stacked(np.stack(parts), place) for parts in zip(*cuts, strict=True)))
        if by_channel:
            return Grouped(self.bits, "channels", self.groups), known
        return Grouped(self.bits, "places", self.groups, spots.shape[-1]), known


def _stacked(array: Any, place: Place) -> Array:
    """An array with layers in front as one with the axes of a kernel in front."""
    dtype = jnp.uint8 if array.dtype.kind in "iu" else jnp.float32
    return jnp.asarray(array.reshape(*place.front, *array.shape[1:]), dtype)


def _ends(x: Float[Array, "*batch k"]) -> dict[str, Array]:
    """Smallest and largest of every channel, and of every place where there are any."""
    axes = tuple(range(x.ndim - 1))
    told = {"low": jnp.min(x, axes), "high": jnp.max(x, axes)}
    if x.ndim == 3:
        told |= {"place_low": jnp.min(x, (0, 2)), "place_high": jnp.max(x, (0, 2))}
    return told


def _wider(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    return {name: (np.minimum if name.endswith("low") else np.maximum)(old[name], new[name]) for name in old}


def spread(low: Float[np.ndarray, " n"], high: Float[np.ndarray, " n"]) -> float:
    """How much the ranges along an axis differ."""
    return float(high.max() - high.min() + low.max() - low.min())


def expected_error(low: Float[np.ndarray, " n"], high: Float[np.ndarray, " n"], groups: int) -> float:
    """Mean squared width of the grids of the best cut, to which the expected error is proportional."""
    bottom, top, member = cut(low, high, groups)
    return float(np.mean((top - bottom)[member] ** 2))


def cut(
    low: Float[np.ndarray, " n"], high: Float[np.ndarray, " n"], groups: int
) -> tuple[Float[np.ndarray, " g"], Float[np.ndarray, " g"], Int[np.ndarray, " n"]]:
    """Groups of like range: their ends, and the group of every index.

    Args:
      low: smallest number of every index.
      high: largest number of every index.
      groups: at most so many; with fewer indices the last groups are empty, with ends 0.
    """
    low, high = np.minimum(low, 0).astype(np.float64), np.maximum(high, 0).astype(np.float64)
    orders = [np.argsort(key, kind="stable") for key in (np.maximum(-low, high), low, high)]
    found = [(*_partition(low[order], high[order], groups), order) for order in orders]
    _, starts, order = min(found, key=lambda one: one[0])
    bottom, top = np.zeros(groups), np.zeros(groups)
    member = np.zeros(len(low), np.int64)
    for group, (start, stop) in enumerate(zip(starts, [*starts[1:], len(low)], strict=True)):
        inside = order[start:stop]
        bottom[group], top[group], member[inside] = low[inside].min(), high[inside].max(), group
    return bottom, top, member


def _partition(
    low: Float[np.ndarray, " n"], high: Float[np.ndarray, " n"], groups: int
) -> tuple[float, list[int]]:
    """The cut of a row into neighbours with the least sum of squared widths, and where its pieces start."""
    count = len(low)
    widths = np.full((count + 1, count + 1), np.inf)  # of the piece from i up to j
    for start in range(count):
        span = np.maximum.accumulate(high[start:]) - np.minimum.accumulate(low[start:])
        widths[start, start + 1 :] = span**2 * np.arange(1, count - start + 1)
    best = widths[0].copy()
    best[0] = 0
    back = []
    for _ in range(1, min(groups, count)):
        tried = best[:, None] + widths  # the last piece starts at i
        at = np.argmin(tried, 0)
        new = np.take_along_axis(tried, at[None], 0)[0]
        keep = best <= new
        back.append(np.where(keep, -1, at))
        best = np.where(keep, best, new)
    starts, stop = [], count
    for at in reversed(back):
        if at[stop] >= 0:
            starts.append(int(at[stop]))
            stop = int(at[stop])
    return float(best[count]), [0, *reversed(starts)]
