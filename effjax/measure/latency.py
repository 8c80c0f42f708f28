"""How long a function takes, measured so that the figure can be believed.

Compile and warm up first, wait for the result, rotate several inputs so that no cache flatters, and give the
median with its spread. Two candidates are compared inside one run, turn by turn: the machine's other
load then falls on both, and the ratio of neighbouring turns is steadier than the ratio of two medians.

A cheaper function is worth what it saves in time, not in arithmetic. So every comparison holds both: the
speed-up that the multiply-accumulates promise, and the share of it that came true,

    predicted = MACs of the baseline / MACs of the candidate
    realised  = measured speed-up / predicted speed-up

1 keeps the promise; gathers, small shapes and memory traffic leave less.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich.table import Table

from effjax.errors import UsageError
from effjax.measure.cost import Cost, count
from effjax.measure.device_time import device_seconds, on_accelerator
from effjax.measure.tree import short


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds a call, over several runs."""

    runs: tuple[float, ...]
    """Every run, in order, by the host's clock: dispatch and waiting included."""
    device: float | None = None
    """Seconds a call for which the accelerator was busy; None where there is none, as on a CPU."""

    @property
    def median(self) -> float:
        """The middle run."""
        return float(np.median(self.runs))

    @property
    def spread(self) -> float:
        """Interquartile range: the width of the middle half of the runs."""
        low, high = np.quantile(self.runs, (0.25, 0.75))
        return float(high - low)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Candidates timed turn by turn; the first one is the baseline."""

    timings: Mapping[str, Timing]
    costs: Mapping[str, Cost] = dataclasses.field(default_factory=dict)
    """What each costs; a candidate without a cost has no prediction."""
    input_sets: int = 1
    """How many sets of inputs took turns. With one, everything may come from a cache."""

    @property
    def baseline(self) -> str:
        """The name of the candidate that the others are compared with."""
        return next(iter(self.timings))

    def speedups(self, name: str) -> tuple[float, ...]:
        """The baseline's time over the candidate's, round by round."""
        pairs = zip(self.timings[self.baseline].runs, self.timings[name].runs, strict=True)
        return tuple(baseline / candidate for baseline, candidate in pairs)

    def speedup(self, name: str) -> float:
        """The median over rounds: 2.0 is twice as fast as the baseline."""
        return float(np.median(self.speedups(name)))

    def predicted(self, name: str) -> float | None:
        """The speed-up that arithmetic alone would give: MACs of the baseline over those of the candidate.

        None where either has no cost or no MACs.
        """
        baseline, candidate = (self._macs(which) for which in (self.baseline, name))
        return baseline / candidate if baseline and candidate else None

    def realised(self, name: str) -> float | None:
        """The share of the predicted speed-up that was measured; None where nothing is predicted."""
        predicted = self.predicted(name)
        return None if predicted is None else self.speedup(name) / predicted

    def table(self) -> Table:
        """One row a candidate: time, spread, speed-up, MACs, predicted and realised speed-up."""
        drawn = Table("candidate")
        on_device = any(timing.device is not None for timing in self.timings.values())
        headings = ("median", "spread", *(("on device",) if on_device else ()), "speed-up")
        for heading in (*headings, "MACs", "predicted", "realised"):
            drawn.add_column(heading, justify="right")
        for name, timing in self.timings.items():
            drawn.add_row(
                name,
                _duration(timing.median),
                _duration(timing.spread),
                *((_duration(timing.device),) if on_device else ()),
                f"{self.speedup(name):.2f}x",
                short(self._macs(name)) if self._macs(name) else "-",
                _or_dash(self.predicted(name), ".2f", "x"),
                _or_dash(self.realised(name), ".0%"),
            )
        drawn.caption = "\n".join(self._notes()) or None
        return drawn

    def _macs(self, name: str) -> int:
        return self.costs[name].macs if name in self.costs else 0

    def _notes(self) -> list[str]:
        notes = [
            f"{name}: not counted: " + "; ".join(cost.unknown)
            for name, cost in self.costs.items()
            if cost.unknown
        ]
        if self.input_sets == 1:
            notes.append("one set of inputs: caches may flatter")
        return notes


def time_function(
    function: Callable[..., Any], *input_sets: Sequence[Any], warmup: int = 2, repeats: int = 10
) -> Timing:
    """Times `function(*inputs)`, taking the input sets in turn and waiting for every result.

    Give several input sets, together larger than the caches: with one alone, whatever fits there is read
    from there.

    Args:
      function: usually jitted; it must not donate its inputs, which are used again.
      *input_sets: each the tuple of arguments of one call.
      warmup: runs whose time is thrown away; each input set gets at least one, which compiles it.
      repeats: runs that count.

    Raises:
      UsageError: without inputs or repeats.
    """
    alone = compare({"function": function}, input_sets, warmup=warmup, repeats=repeats, costs={})
    return alone.timings["function"]


def compare(
    functions: Mapping[str, Callable[..., Any]],
    input_sets: Sequence[Sequence[Any]],
    *,
    warmup: int = 2,
    repeats: int = 10,
    costs: Mapping[str, Cost] | None = None,
) -> Comparison:
    """Times several functions on the same inputs in one run, in turn: A B A B ...

    Args:
      functions: the candidates by name, the baseline first.
      input_sets: each the tuple of arguments of one call, several by preference (see `time_function`); a
        round uses one set for all candidates.
      warmup: rounds whose time is thrown away; each input set gets at least one.
      repeats: rounds that count.
      costs: what the candidates cost, by name; those left out get no prediction. By default each is counted
        here, on the first input set, by tracing it once.

    Raises:
      UsageError: without functions, inputs or repeats, or for a function that cannot be traced to be counted.
    """
    if not functions or not input_sets or repeats < 1:
        raise UsageError("Timing needs at least one function, one tuple of inputs and repeats >= 1.")
    if costs is None:
        costs = {name: _cost(name, function, input_sets[0]) for name, function in functions.items()}
    accelerated = dict.fromkeys(functions, False)
    for turn in range(max(warmup, len(input_sets))):
        for name, function in functions.items():
            result = jax.block_until_ready(function(*input_sets[turn % len(input_sets)]))
            accelerated[name] = on_accelerator(result)
    runs: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats):
        for name, function in functions.items():
            runs[name].append(_seconds(function, input_sets[turn % len(input_sets)]))
    device = {
        name: device_seconds(function, input_sets, repeats) if accelerated[name] else None
        for name, function in functions.items()
    }
    timings = {name: Timing(tuple(seconds), device[name]) for name, seconds in runs.items()}
    return Comparison(timings, costs, len(input_sets))


def _seconds(function: Callable[..., Any], inputs: Sequence[Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(*inputs))
    return time.perf_counter() - start


def _cost(name: str, function: Callable[..., Any], inputs: Sequence[Any]) -> Cost:
    try:
        return count(function, *inputs, parameters=None)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"{name!r} cannot be traced, so its MACs are unknown: {str(error).splitlines()[0]} Give "
            f"costs={{{name!r}: count(...)}} of the function inside, or costs={{}} to compare times alone."
        ) from error


def _duration(seconds: float | None) -> str:
    """Three digits and a unit: `1.23 ms`."""
    if seconds is None:
        return "-"
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def _or_dash(figure: float | None, form: str, unit: str = "") -> str:
    return "-" if figure is None else f"{figure:{form}}{unit}"
