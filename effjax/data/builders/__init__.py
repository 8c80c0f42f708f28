"""The data sets that need no network, written as TFDS data sets and read like any other.

`prepare("digits", data_dir)` writes `data_dir/digits/1.0.0` with TFDS's own array_record writer. TensorFlow
is never imported: the builders hand pictures to TFDS as encoded PNG files, the one place where it would
have asked TensorFlow for help.
"""

import contextlib
import io
from pathlib import Path

import tensorflow_datasets as tfds

from effjax.data.builders.digits import Digits
from effjax.data.builders.motion import Motion
from effjax.data.builders.pydocs import Pydocs
from effjax.data.builders.scenes import Scenes
from effjax.errors import RunError, UsageError, did_you_mean

EMBEDDED: dict[str, type[tfds.core.GeneratorBasedBuilder]] = {
    "digits": Digits,
    "motion": Motion,
    "pydocs": Pydocs,
    "scenes": Scenes,
}


def prepare(name: str, data_dir: str | Path | None = None) -> Path:
    """Writes an embedded data set if it is not there yet, and returns the directory that holds it.

    TFDS writes into a directory of another name and renames it at the end, so a reader sees all or nothing.
    Two processes may prepare at once: the first rename wins, the other finds the place taken and discards
    its copy, which is the same, since every builder is deterministic.

    Args:
      name: a key of `EMBEDDED`.
      data_dir: the TFDS data directory; None is TFDS's own default.

    Raises:
      UsageError: for a name that is not embedded.
      RunError: if the directory cannot be written.
    """
    if name not in EMBEDDED:
        raise UsageError(f"{name!r} is not an embedded data set. {did_you_mean(name, EMBEDDED)}")
    try:
        builder = EMBEDDED[name](data_dir=_text(data_dir), file_format="array_record")
        _write(builder)
    except OSError as error:
        place = data_dir or tfds.core.constants.DATA_DIR
        raise RunError(
            f"The data set {name!r} could not be written to {place}: {error}. "
            "Name a directory with room in it by data_dir or $TFDS_DATA_DIR."
        ) from error
    return Path(builder.data_path)


def _write(builder: tfds.core.GeneratorBasedBuilder) -> None:
    """Runs TFDS's preparation, without its progress bars, and yields to whoever was first."""
    if builder.data_path.exists():
        return
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            builder.download_and_prepare()
    except OSError:
        if not builder.data_path.exists():
            raise


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(Path(path).expanduser())
