"""Rounding what enters kernels that are stored in few bits, on grids found in one pass over training data.

    min_max      from the smallest to the largest number that was seen
    ema          the same of every batch, averaged:  low <- d low + (1 - d) min,   d = 0.99
    percentile   from the (1 - p) to the p quantile of all numbers
    mse          of the shares 1, 0.99, .. of the range that was seen, the one with the least squared error

Krishnamoorthi 2018, arXiv:1806.08342, sections 3.1.2 and 3.2. Quantiles and errors are those of a histogram
with a bin for each of the upper 16 bits of a float32, so that bins are as fine as numbers are small and one
pass is enough.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from effjax.compress.storage.input_kinds import KINDS as INPUTS
from effjax.compress.storage.inputs import Range, Static
from effjax.compress.storage.trees import replaced, stored_in
from effjax.compress.storage.uniform import QTensor
from effjax.compress.subject import Calibration, Subject
from effjax.compress.watch import watch
from effjax.config import part
from effjax.errors import UsageError
from effjax.layers.stored import Place
from effjax.matching import match

How = Literal["min_max", "ema", "percentile", "mse"]
_BINS = 2**16  # of float32, by its upper 16 bits


@dataclasses.dataclass(frozen=True)
class CalibrateInputs:
    """Rounds what enters kernels that an earlier step stored in a uniform layout.

    Attributes:
      inputs: how; what is found out beforehand is found out here.
      kernels: regexps of whole paths.
      leave: regexps of kernels that get what enters as it is, whatever `kernels` says.
      how: the range of a static grid.
      batches: of training data, that are looked at.
      decay: of `how="ema"`.
      percentile: of `how="percentile"`, in percent.
      shares: of `how="mse"`, how many are tried, from 1 down in steps of 0.01.
    """

    inputs: Any = part(INPUTS, default=Static)
    kernels: tuple[str, ...] = (".*",)
    leave: tuple[str, ...] = ()
    how: How = "ema"
    batches: int = 100
    decay: float = 0.99
    percentile: float = 99.99
    shares: int = 80

    def __post_init__(self) -> None:
        if self.batches < 1:
            raise UsageError(f"batches={self.batches} must be at least 1.")
        if not 0 <= self.decay < 1:
            raise UsageError(f"decay={self.decay} must be at least 0 and below 1.")
        if not 50 < self.percentile <= 100:
            raise UsageError(f"percentile={self.percentile} is not above 50 and at most 100.")
        if not 1 <= self.shares <= 99:
            raise UsageError(f"shares={self.shares} is not from 1 to 99.")

    def apply(self, subject: Subject, calibration: Calibration) -> Subject:
        """Finds the grids, and names them in the layouts.

        Raises:
          UsageError: where no kernel is stored in a uniform layout, for a pattern that matches none, or where
            what enters one is not finite.
        """
        places = rounded_kernels(subject, self.kernels, self.leave)
        stored, made = stored_in(subject.params), {}
        seen: dict[str, list[Any]] = {}
        if isinstance(self.inputs, Static):
            seen = self._seen(subject, places, calibration)
        for path, place in places.items():
            if path in seen and any(layer is None for layer in seen[path]):
                calibration.report(f"nothing entered {path}: it gets what enters as it is.")
                continue
            known = self.inputs.unknown(place.front, place.matrix[0])
            if path in seen:
                ends = np.asarray([self._ends(layer) for layer in seen[path]], np.float32)
                known = Range(*(jnp.asarray(end.reshape(place.front)) for end in ends.T))
            made[path] = with_inputs(stored[path], self.inputs, known)
        calibration.report(f"what enters {len(made)} kernels is rounded to {self.inputs.bits} bits.")
        return subject.with_params(replaced(subject.params, made))

    def _seen(
        self, subject: Subject, places: dict[str, Place], calibration: Calibration
    ) -> dict[str, list[Any]]:
        counted = self.how in ("percentile", "mse")

        def summary(x: Float[Array, "..."]) -> dict[str, Array]:
            told = {"low": jnp.min(x), "high": jnp.max(x), "finite": jnp.all(jnp.isfinite(x))}
            return told | ({"counts": histogram(x)} if counted else {})

        def add(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
            finite = old["finite"] & new["finite"]
            if self.how == "ema":
                d = self.decay
                return {end: d * old[end] + (1 - d) * new[end] for end in ("low", "high")} | {
                    "finite": finite
                }
            total = {"low": np.minimum(old["low"], new["low"]), "high": np.maximum(old["high"], new["high"])}
            counts = {"counts": old["counts"].astype(np.int64) + new["counts"]} if counted else {}
            return total | counts | {"finite": finite}

        seen = watch(subject, places, calibration.first(self.batches), summary, add, entire=True)
        check_finite(seen, lambda told: bool(told["finite"]))
        return seen

    def _ends(self, told: dict[str, Any]) -> tuple[float, float]:
        """Ends of the grid for what was seen."""
        low, high = float(told["low"]), float(told["high"])
        if self.how == "percentile":
            found = quantiles(told["counts"], ((100 - self.percentile) / 100, self.percentile / 100))
            return max(found[0], low), min(found[1], high)
        if self.how == "mse":
            share = best_share(told["counts"], low, high, self.inputs.bits, self.shares)
            return low * share, high * share
        return low, high


def rounded_kernels(subject: Subject, patterns: tuple[str, ...], leave: tuple[str, ...]) -> dict[str, Place]:
    """The kernels that are stored in a uniform layout, and whose path matches.

    Raises:
      UsageError: where there are none, or for a pattern that matches none.
    """
    held = [path for path, leaf in stored_in(subject.params).items() if isinstance(leaf, QTensor)]
    if not held:
        raise UsageError("no kernel is stored in a uniform layout: put a step like 'round' before this one.")
    tree: dict[str, Any] = dict.fromkeys(held, 0)
    wanted = match([(pattern, True) for pattern in patterns], tree, default=False, where="kernels")
    left = match([(pattern, True) for pattern in leave], tree, default=False, where="leave")
    places = subject.places()
    return {path: places[path] for path in held if wanted[path] and not left[path]}


def with_inputs(kernel: Any, inputs: Any, known: Any) -> Any:
    """A stored kernel whose layout says how what enters is rounded."""
    layout = dataclasses.replace(kernel.layout, inputs=inputs)
    return kernel.replace(layout=layout, inputs=known)


def check_finite(seen: dict[str, list[Any]], finite: Callable[[Any], bool]) -> None:
    """Refuses to calibrate on what is not finite.

    Raises:
      UsageError: naming the kernel.
    """
    for path, layers in seen.items():
        bad = [i for i, told in enumerate(layers) if told is not None and not finite(told)]
        if bad:
            where = f" of layer {bad[0]}" if len(layers) > 1 else ""
            raise UsageError(
                f"calibration: what enters {path}{where} holds NaN or infinity. Evaluate the run on its data "
                f"first; if its loss is finite there, look at the weights of this kernel and those before it."
            )


def histogram(x: Float[Array, "..."]) -> Array:
    """How often numbers with each upper 16 bits of a float32 occur."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32).reshape(-1), jnp.uint32) >> 16
    return jnp.zeros(_BINS, jnp.int32).at[bits].add(1)


def _sorted(counts: Any) -> tuple[Any, Any]:
    """The middles of the bins that hold numbers, in order, and how many they hold."""
    there = np.flatnonzero(counts)
    middles = ((there.astype(np.uint32) << 16) | 0x8000).view(np.float32)
    middles = np.where(there % 2**15 == 0, np.float32(0), middles)  # exact zeros are many, tiny numbers few
    order = np.argsort(middles)
    return middles[order].astype(np.float64), counts[there][order].astype(np.float64)


def quantiles(counts: Any, shares: tuple[float, ...]) -> tuple[float, ...]:
    """Numbers below which such shares of what was counted lie."""
    middles, many = _sorted(counts)
    running = np.cumsum(many)
    at = np.searchsorted(running, np.asarray(shares) * running[-1])
    return tuple(float(middles[min(i, len(middles) - 1)]) for i in at)


def best_share(counts: Any, low: float, high: float, bits: int, shares: int) -> float:
    """The share of a range whose grid has the least squared error over what was counted."""
    middles, many = _sorted(counts)
    errors = []
    for share in 1 - 0.01 * np.arange(shares):
        bottom, top = min(low * share, 0), max(high * share, 0)
        scale = (top - bottom) / (2**bits - 1) or 1.0
        zero = np.round(-bottom / scale)
        codes = np.clip(np.round(middles / scale) + zero, 0, 2**bits - 1)
        errors.append(np.sum(many * ((codes - zero) * scale - middles) ** 2))
    return float(1 - 0.01 * int(np.argmin(errors)))
