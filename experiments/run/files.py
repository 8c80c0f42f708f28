"""Artefacts on disk: written whole or not at all, and JSON that every reader accepts."""

import contextlib
import errno
import json
import math
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from effjax.errors import RunError

# JSON has no numbers for these; the names are those that protocol buffers use in their JSON form.
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns whatever the file system refuses inside the block into a RunError that names `path`."""
    try:
        yield
    except OSError as error:
        raise RunError(refusal(error, path)) from error


def refusal(error: OSError, path: str | os.PathLike[str] | None) -> str:
    """Says why the file system refused `path`, and what to do where that is known."""
    named = f"'{os.fspath(path)}'" if path is not None else "a file that the system did not name"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk is full: {named} could not be written. Free some space and start again to resume."
    if error.errno == errno.EROFS:
        return f"{named} is on a read-only file system. Give a --workdir that can be written."
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{named} is not open to this user: check its permissions."
    return f"{named}: {error.strerror or error}."


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Writes `data` so that `path` holds either its old content or all of the new, whatever happens.

    The bytes go to a hidden file beside `path`, are forced to disk and take its name in one step; the folder
    is forced to disk too, or a power cut could undo the renaming.

    Raises:
      RunError: naming `path`, if the disk is full or cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def sweep(folder: str | os.PathLike[str]) -> None:
    """Removes what a killed `write_atomic` left in `folder`; nobody else may be writing there."""
    with naming(folder):
        for leftover in Path(folder).glob(".*.tmp"):
            leftover.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_json(data: Any, *, indent: int | None = None) -> str:
    """Writes plain data as strict JSON, with "NaN", "Infinity" and "-Infinity" for what JSON has no number.

    Raises:
      TypeError: for a value that JSON cannot hold, named with its path.
    """
    return json.dumps(jsonable(data), indent=indent, allow_nan=False)


def jsonable(data: Any, path: str = "") -> Any:
    """Turns sections into dicts, tuples into lists and numbers that are not finite into their names."""
    if isinstance(data, Mapping) or hasattr(data, "to_dict"):
        return {str(key): jsonable(data[key], f"{path}.{key}" if path else str(key)) for key in data}
    if isinstance(data, list | tuple):
        return [jsonable(value, f"{path}[{index}]") for index, value in enumerate(data)]
    if isinstance(data, float) and not math.isfinite(data):
        return "NaN" if math.isnan(data) else "Infinity" if data > 0 else "-Infinity"
    if data is None or isinstance(data, bool | int | float | str):
        return data
    raise TypeError(f"{path or 'the value'} is a {type(data).__name__}, which JSON cannot hold: {data!r}")


def number(value: Any) -> Any:
    """Undoes `to_json` for one value: "NaN" is the number again."""
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value
