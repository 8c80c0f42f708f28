"""`goodput.jsonl`: what every start of a run spent its time on, and what of it was in vain.

    {"start": 0, "from": 0, "step": 400, "seconds": {"starting": 6.1, "compile": 9.7, "step": 41.0, ...}}

A start appends a line whenever it logs, with its sums so far. Steps behind the checkpoint from which the next
start went on were done twice: their time is lost. Time between two starts is nobody's.
"""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

from effjax.train.goodput import KINDS
from experiments.run.files import naming, to_json
from experiments.run.formatting import duration
from experiments.run.report import Section, Table

FILE_NAME = "goodput.jsonl"


class GoodputLog:
    """The lines of one start.

    Args:
      workdir: of the run.
      restored: the step that it goes on from.
      starting: seconds from its beginning to its loop.
    """

    def __init__(self, workdir: Path, restored: int, starting: float) -> None:
        self.path = workdir / FILE_NAME
        self._start = 1 + max((line["start"] for line in lines(self.path)), default=-1)
        self._restored, self._starting = restored, starting
        with naming(self.path), self.path.open("a+b") as file:
            if file.tell() and not self.path.read_bytes().endswith(b"\n"):
                file.write(b"\n")  # behind a line that a kill tore

    def write(self, step: int, seconds: dict[str, float]) -> None:
        """Appends the sums so far."""
        told = {**seconds, "starting": seconds["starting"] + self._starting}
        rounded = {kind: round(value, 4) for kind, value in told.items()}
        line = {"start": self._start, "from": self._restored, "step": step, "seconds": rounded}
        with naming(self.path), self.path.open("a") as file:
            file.write(to_json(line) + "\n")


def lines(path: Path) -> list[dict[str, Any]]:
    """What was written; a line that a kill tore is left out."""
    if not path.is_file():
        return []
    with naming(path):
        text = path.read_text()
    return [json.loads(line) for line in text.splitlines() if line.endswith("}}")]


@dataclasses.dataclass(frozen=True)
class Goodput:
    """All starts of a run together.

    Attributes:
      seconds: by kind, what was lost taken from the steps.
      lost: of steps that were done again.
      starts: how many there were.
    """

    seconds: dict[str, float]
    lost: float
    starts: int

    @property
    def share(self) -> float:
        """Of all time, that of steps that counted."""
        total = sum(self.seconds.values()) + self.lost
        return self.seconds["step"] / total if total else 0.0


def read(workdir: Path) -> Goodput | None:
    """The sums over all starts; None where there was none yet."""
    newest = {line["start"]: line for line in lines(workdir / FILE_NAME)}
    if not newest:
        return None
    starts = [newest[number] for number in sorted(newest)]
    seconds: dict[str, float] = {kind: sum(start["seconds"][kind] for start in starts) for kind in KINDS}
    lost = 0.0
    for start, following in itertools.pairwise(starts):
        done = start["step"] - start["from"]
        again = max(0, start["step"] - following["from"])
        lost += start["seconds"]["step"] * again / done if done else 0.0
    seconds["step"] -= lost
    return Goodput(seconds, lost, len(starts))


def section(found: Goodput) -> Section:
    """What the report says of it."""
    rows = [*found.seconds.items(), ("steps done again", found.lost)]
    total = sum(seconds for _, seconds in rows)
    cells = [(name, duration(seconds), f"{seconds / total:.1%}") for name, seconds in rows]
    starts = "one start" if found.starts == 1 else f"{found.starts} starts"
    return Section("Where the time went", [Table((starts, "time", "share"), cells)])
