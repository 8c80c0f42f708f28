"""What a sweep tries: values of config keys, as typed.

    --sweep=optimizer.lr=1e-3,3e-3,1e-2        these
    --sweep=optimizer.lr=log:1e-4:1e-2         any number between, as likely in each factor of ten
    --sweep=model.drop_path=uniform:0:0.3      any number between
    --sweep=model.depth=integer:2:12           any whole number between, both ends included

Lists alone make a grid of all combinations; a number of trials draws that many of it at random, and ranges
need one.
"""

import dataclasses
import itertools
import math
import random
from collections.abc import Sequence

from effjax.errors import UsageError

RANGES = ("log", "uniform", "integer")

# One value for each key, as on a command line.
Point = tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Axis:
    """The values of one key.

    Attributes:
      key: of the config, without `config.`.
      values: to choose from; empty for a range.
      range: "log", "uniform" or "integer"; empty for a list.
      low: end of a range.
      high: the other.
    """

    key: str
    values: tuple[str, ...] = ()
    range: str = ""
    low: float = 0.0
    high: float = 0.0

    def draw(self, source: random.Random) -> str:
        """One of its values."""
        if self.values:
            return source.choice(self.values)
        if self.range == "integer":
            return str(source.randint(int(self.low), int(self.high)))
        if self.range == "log":
            return f"{math.exp(source.uniform(math.log(self.low), math.log(self.high))):.4g}"
        return f"{source.uniform(self.low, self.high):.4g}"


def parse(said: str) -> Axis:
    """Reads `KEY=VALUES`.

    Raises:
      UsageError: for anything but a key, an equals sign, and values or a range that is one.
    """
    key, equals, text = said.partition("=")
    key = key.removeprefix("config.")
    if not (key and equals and text):
        raise UsageError(f"--sweep={said}: write KEY=VALUE,VALUE,... or KEY=log:LOW:HIGH.")
    kind, *ends = text.split(":")
    if kind not in RANGES:
        values = tuple(text.split(","))
        if "" in values or len(set(values)) < len(values):
            raise UsageError(f"--sweep={said}: every value once, and none of them empty.")
        return Axis(key, values)
    try:
        low, high = (int(end) if kind == "integer" else float(end) for end in ends)
    except ValueError:
        raise UsageError(f"--sweep={said}: a range is {kind}:LOW:HIGH, two numbers.") from None
    if not low < high or (kind == "log" and low <= 0):
        least = " and above 0" if kind == "log" else ""
        raise UsageError(f"--sweep={said}: LOW must be less than HIGH{least}.")
    return Axis(key, range=kind, low=low, high=high)


def points(axes: Sequence[Axis], trials: int | None, seed: int) -> list[Point]:
    """What is tried: all combinations, or so many drawn at random, none of them twice.

    Raises:
      UsageError: for a range without a number of trials, a key that comes twice, and more trials than
        there are combinations.
    """
    keys = [axis.key for axis in axes]
    for key in keys:
        if keys.count(key) > 1:
            raise UsageError(f"--sweep: {key} is there twice; write all of its values into one.")
    ranges = [axis.key for axis in axes if axis.range]
    if trials is None:
        if ranges:
            raise UsageError(f"--sweep: {ranges[0]} is a range: say how many --trials to draw from it.")
        return [
            tuple(zip(keys, values, strict=True)) for values in itertools.product(*(a.values for a in axes))
        ]
    most = math.prod(len(axis.values) for axis in axes)
    if not ranges and trials > most:
        raise UsageError(f"--trials={trials}: there are {most} combinations; leave it out to try them all.")
    source, found = random.Random(seed), dict[Point, None]()
    for _ in range(1000 * trials):
        found.setdefault(tuple((axis.key, axis.draw(source)) for axis in axes))
        if len(found) == trials:
            return list(found)
    raise UsageError(f"--trials={trials}: the ranges hold only {len(found)} different points.")
