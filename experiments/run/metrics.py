"""The numbers of a run: `metrics.jsonl`, one object a line, and event files for TensorBoard.

{"step": 200, "split": "train", "loss": 0.41, "learning_rate": 0.001}
{"step": 200, "split": "test", "loss": 0.52, "accuracy": 0.93}
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effjax.errors import RunError
from experiments.run.events import EventFile
from experiments.run.files import naming, number, to_json, write_atomic

FILE_NAME = "metrics.jsonl"
EVENTS_FOLDER = "events"


class MetricsWriter:
    """Appends measurements to the files of a run. Use it as a context manager.

    A resumed run starts at the step it restored: lines of later steps, which the killed run wrote and this
    one will write again, are removed, and so is a line that the kill tore. TensorBoard is told the same.
    """

    def __init__(self, workdir: str | os.PathLike[str], *, restored_step: int = 0) -> None:
        self.path = Path(workdir) / FILE_NAME
        if self.path.exists():
            _truncate(self.path, restored_step)
        with naming(self.path):
            # Without a buffer of Python's: a line that the disk refuses must not be tried again at closing.
            self._file = self.path.open("ab", buffering=0)
        events = Path(workdir) / EVENTS_FOLDER
        self._events = EventFile(events, restart_at=restored_step + 1 if events.exists() else None)

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Writes one line, and hands it to the system before it returns.

        Args:
          step: how many steps the optimiser had made.
          split: what was measured: `train`, or the name of an evaluator.
          values: numbers on the host. NaN and the infinities are written as "NaN", "Infinity", "-Infinity".

        Raises:
          RunError: naming the file, if the disk is full.
        """
        numbers = {name: float(value) for name, value in values.items()}
        reserved = {"step", "split"} & set(numbers)
        if reserved:
            raise ValueError(f"A metric may not be called {' or '.join(sorted(reserved))}.")
        line = to_json({"step": int(step), "split": split, **numbers}) + "\n"
        with naming(self.path):
            left = line.encode()
            while left:  # the system may take a part of it, and refuse the rest aloud
                left = left[self._file.write(left) :]
        self._events.write(int(step), {f"{split}/{name}": value for name, value in numbers.items()})

    def close(self) -> None:
        """Closes both files."""
        self._file.close()
        self._events.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns the lines of a `metrics.jsonl` as dicts, in the order written.

    A last line that was torn by a kill (or is being written now) is left out.

    Raises:
      RunError: naming the file and line, where any other line is broken.
    """
    with naming(path):
        lines = Path(path).read_bytes().split(b"\n")
    rows = [_parse(line) for line in lines]
    whole = len(lines) - 1  # the text after the last newline is empty, or torn
    for index, row in enumerate(rows[:whole]):
        if row is None:
            raise RunError(f"{os.fspath(path)}, line {index + 1} is broken: {lines[index][:80]!r}.")
    return [row for row in rows if row is not None]


def _parse(line: bytes) -> dict[str, Any] | None:
    """Reads one line; None where it is no measurement."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int) or "split" not in row:
        return None
    return {name: value if name == "split" else number(value) for name, value in row.items()}


def _truncate(path: Path, last_step: int) -> None:
    """Keeps the whole lines up to `last_step`."""
    with naming(path):
        content = path.read_bytes()
    kept = b""
    for line in content.splitlines(keepends=True):
        row = _parse(line)
        if row is not None and line.endswith(b"\n") and row["step"] <= last_step:
            kept += line
    if kept != content:
        write_atomic(path, kept)
