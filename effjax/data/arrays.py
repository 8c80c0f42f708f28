"""Examples as rows of arrays on disk: latents, pairs of noise and picture, whatever a program made.

A folder holds one `FIELD.npy` a field, all with as many rows as there are examples. Rows are read through a
memory map, as they are asked for.

    with ArrayWriter("runs/pairs", rows=50_000, origin={"run": "runs/flow", "seed": 0}) as writer:
        writer.write(writer.done, {"noise": noise, "image": pictures, "label": labels})

While it is written the folder is called `NAME.partial` and says in `rows.json` how far it came, so that a
writer that was stopped goes on where it was, and a reader sees all or nothing. `origin.json` keeps what the
rows were made from: a writer of other rows does not go on with them.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from effjax.data.records import Example, Metadata
from effjax.errors import RunError, UsageError

_COUNT, _ORIGIN = "rows.json", "origin.json"


@dataclasses.dataclass(frozen=True)
class Arrays:
    """A folder of `FIELD.npy` files, a row an example.

    Args:
      root: the folder.
    """

    root: str

    def open(self) -> "ArraysReader":
        """Raises UsageError for a folder that is missing, empty, unfinished, or whose files do not agree."""
        root = Path(self.root).expanduser()
        if not root.is_dir():
            partial = partial_of(root)
            hint = f" {partial} is not finished: run again what writes it." if partial.is_dir() else ""
            raise UsageError(f"The folder of arrays {root} does not exist.{hint}")
        files = sorted(root.glob("*.npy"))
        if not files:
            raise UsageError(f"The folder {root} has no FIELD.npy files.")
        fields = {}
        for file in files:
            try:
                fields[file.stem] = np.load(file, mmap_mode="r", allow_pickle=False)
            except (ValueError, OSError, EOFError) as error:
                raise UsageError(f"{file} is no array that can be read: {error}") from None
        rows = {name: array.shape[:1] for name, array in fields.items()}
        if len(set(rows.values())) > 1 or () in rows.values() or (0,) in rows.values():
            told = ", ".join(f"{name}.npy {array.shape}" for name, array in fields.items())
            raise UsageError(f"The arrays in {root} need one row for each example, all as many: {told}.")
        status = [file.stat() for file in files]
        identity = f"{root.resolve()}: {[(s.st_size, s.st_mtime_ns) for s in status]}"
        return ArraysReader(fields, Metadata(identity=identity))


class ArraysReader:
    """Reads rows."""

    def __init__(self, fields: Mapping[str, np.ndarray], metadata: Metadata) -> None:
        self._fields = fields
        self.metadata = metadata

    def __len__(self) -> int:
        return len(next(iter(self._fields.values())))

    def __getitem__(self, index: int) -> Example:
        return {name: np.array(array[index]) for name, array in self._fields.items()}


class ArrayWriter:
    """Writes a folder of arrays from the first row to the last, and goes on where it was stopped.

    Attributes:
      done: rows that are written.
    """

    def __init__(self, folder: str | Path, rows: int, origin: Mapping[str, Any]) -> None:
        """Opens what an earlier writer of the same rows left, or nothing.

        Args:
          folder: what will hold the arrays.
          rows: how many there will be.
          origin: what decides their values, as JSON.

        Raises:
          UsageError: where the folder exists, or an unfinished one of another number of rows or origin.
        """
        self.folder, self.rows = unused(folder), rows
        self._partial = partial_of(self.folder)
        self._fields: dict[str, np.ndarray] = {}
        self._origin = json.loads(json.dumps(dict(origin)))
        self.done = 0
        if (self._partial / _COUNT).is_file():
            said = json.loads((self._partial / _COUNT).read_text())
            if said["of"] != rows:
                raise UsageError(
                    f"'{self._partial}' is the beginning of {said['of']} rows, and {rows} were asked for: "
                    f"ask for as many again, or remove it."
                )
            self._check_origin()
            self.done = said["done"]
            for file in self._partial.glob("*.npy"):
                self._fields[file.stem] = np.load(file, mmap_mode="r+")

    def write(self, first: int, values: Mapping[str, Any]) -> None:
        """Writes rows from number `first` on; what goes beyond the last is left out."""
        count = min(len(next(iter(values.values()))), self.rows - first)
        try:
            for name, value in values.items():
                array = np.asarray(value)
                if name not in self._fields:
                    self._begin()
                    shape = (self.rows, *array.shape[1:])
                    self._fields[name] = np.lib.format.open_memmap(
                        self._partial / f"{name}.npy", mode="w+", dtype=array.dtype, shape=shape
                    )
                self._fields[name][first : first + count] = array[:count]
                self._fields[name].flush()  # type: ignore[attr-defined]
            self.done = first + count
            # The count follows the rows: what it says is on disk.
            waiting = self._partial / f"{_COUNT}.new"
            waiting.write_text(json.dumps({"done": self.done, "of": self.rows}))
            os.replace(waiting, self._partial / _COUNT)
        except OSError as error:
            raise RunError(f"'{self._partial}' could not be written: {error}.") from error

    def _begin(self) -> None:
        """Makes the folder, which says what its rows are made from before it has any."""
        self._partial.mkdir(parents=True, exist_ok=True)
        (self._partial / _ORIGIN).write_text(json.dumps(self._origin, indent=2) + "\n")

    def _check_origin(self) -> None:
        """Refuses to go on with rows that were made from something else."""
        began = json.loads((self._partial / _ORIGIN).read_text())
        for name in {**began, **self._origin}:
            if began.get(name) != self._origin.get(name):
                raise UsageError(
                    f"'{self._partial}' was begun with {name}={began.get(name)!r}, and this is "
                    f"{name}={self._origin.get(name)!r}: go on as it was begun, or remove it."
                )

    def __enter__(self) -> "ArrayWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None and self.done == self.rows:
            self._fields.clear()
            (self._partial / _COUNT).unlink()
            os.replace(self._partial, self.folder)


def unused(folder: str | Path) -> Path:
    """The folder that a writer will make; for who works long before there are rows to write.

    Raises:
      UsageError: where it exists.
    """
    folder = Path(folder).expanduser()
    if folder.exists():
        raise UsageError(f"'{folder}' exists: name another folder, or remove it first.")
    return folder


def partial_of(folder: Path) -> Path:
    """What a folder is called while it is written."""
    return folder.with_name(f"{folder.name}.partial")
