"""How long a function takes, measured so that the figure can be believed.

Compile and warm up first, wait for the result, rotate several inputs so that no cache flatters, and give the
median with its spread. Two candidates are compared inside one run, turn by turn: the machine's other
load then falls on both, and the ratio of neighbouring turns is steadier than the ratio of two medians.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from effjax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds a call, over several runs."""

    runs: tuple[float, ...]
    """Every run, in order."""

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


def time_function(
    function: Callable[..., Any], *input_sets: Sequence[Any], warmup: int = 2, repeats: int = 10
) -> Timing:
    """Times `function(*inputs)`, taking the input sets in turn and waiting for every result.

    Args:
      function: usually jitted; it must not donate its inputs, which are used again.
      *input_sets: each the tuple of arguments of one call.
      warmup: runs whose time is thrown away; each input set gets at least one, which compiles it.
      repeats: runs that count.

    Raises:
      UsageError: without inputs or repeats.
    """
    return compare({"function": function}, input_sets, warmup=warmup, repeats=repeats).timings["function"]


def compare(
    functions: Mapping[str, Callable[..., Any]],
    input_sets: Sequence[Sequence[Any]],
    *,
    warmup: int = 2,
    repeats: int = 10,
) -> Comparison:
    """Times several functions on the same inputs in one run, in turn: A B A B ...

    Args:
      functions: the candidates by name, the baseline first.
      input_sets: each the tuple of arguments of one call; a round uses one set for all candidates.
      warmup: rounds whose time is thrown away; each input set gets at least one.
      repeats: rounds that count.

    Raises:
      UsageError: without functions, inputs or repeats.
    """
    if not functions or not input_sets or repeats < 1:
        raise UsageError("Timing needs at least one function, one tuple of inputs and repeats >= 1.")
    for turn in range(max(warmup, len(input_sets))):
        for function in functions.values():
            _seconds(function, input_sets[turn % len(input_sets)])
    runs: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats):
        for name, function in functions.items():
            runs[name].append(_seconds(function, input_sets[turn % len(input_sets)]))
    return Comparison({name: Timing(tuple(seconds)) for name, seconds in runs.items()})


def _seconds(function: Callable[..., Any], inputs: Sequence[Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(*inputs))
    return time.perf_counter() - start
