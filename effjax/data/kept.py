"""Numbers that took long to find, kept on disk: where the lines of a file start, how long documents are."""

import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import logging
from jaxtyping import Int64

FOLDER = Path("~/.cache/effjax/index")
WORTH_KEEPING = 2.0  # seconds; what is found faster leaves nothing behind in anybody's home


def kept(
    key: str, find: Callable[[], Int64[np.ndarray, "..."]], worth_keeping: float = WORTH_KEEPING
) -> Int64[np.ndarray, "..."]:
    """Returns `find()`, from the file an earlier call left under `key` where there is one.

    The key is part of the file's name, so what was found in other data is never looked at; files are written
    whole or not at all. A file that cannot be read is as good as none, and a folder that cannot be written
    costs the time again at the next start.

    Args:
      key: everything that the result depends on.
      find: finds the numbers.
      worth_keeping: how many seconds `find` must have taken for its result to be written.
    """
    path = FOLDER.expanduser() / f"{hashlib.sha256(key.encode(errors='replace')).hexdigest()}.npy"
    try:
        return _read(path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, EOFError) as error:
        logging.warning("The index %s cannot be read and is made again: %s", path, error)
    begin = time.monotonic()
    found = find()
    if time.monotonic() - begin >= worth_keeping:
        try:
            _write(path, found)
        except OSError as error:
            logging.warning("The index could not be kept as %s: %s", path, error)
    return found


def _read(path: Path) -> np.ndarray:
    values = np.load(path, allow_pickle=False)
    if not isinstance(values, np.ndarray) or values.dtype != np.int64:
        raise ValueError("it holds something else")
    return values


def _write(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            np.save(file, values, allow_pickle=False)
        os.replace(partial, path)
    except OSError:
        Path(partial).unlink(missing_ok=True)
        raise
