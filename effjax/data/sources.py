"""Where examples come from: prepared TFDS data sets, folders of images or arrays, JSON lines,
and what is drawn as it is asked for: probes, prompts of examples.

A definition (a frozen dataclass, what a config names) is opened into a reader (random access by number).
"""

import array
import dataclasses
import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int64, UInt8
from PIL import Image, UnidentifiedImageError
from tensorflow_datasets.core import read_only_builder

from effjax.data import builders
from effjax.data.arrays import Arrays
from effjax.data.in_context import Autoregression, Regression
from effjax.data.kept import kept
from effjax.data.probes import Probe, ProbeMixture
from effjax.data.records import BadRecord, Example, Examples, Metadata
from effjax.data.rounds import RunningSum, Traces
from effjax.data.spelled import SpelledPictures
from effjax.errors import UsageError, did_you_mean

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}

# Pillow's names by number of channels.
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}

# What Pillow may raise for a file that is not the picture its name claims.
_UNDECODABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


@runtime_checkable
class Reader(Examples, Protocol):
    """An opened source."""

    @property
    def metadata(self) -> Metadata:
        """What is known without reading examples."""


@runtime_checkable
class Source(Protocol):
    """The definition of a source."""

    def open(self) -> Reader:
        """Raises UsageError for what is not there."""


def decode_image(data: bytes, mode: str) -> UInt8[np.ndarray, "height width channels"]:
    """Decodes a picture file to `mode`: "L", "RGB" or "RGBA", whatever the file has.

    Raises:
      One of `_UNDECODABLE`: for what is no picture, or only a part of one.
    """
    try:
        opened = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:  # its own message is the address of an object
        raise ValueError("this is not a picture that Pillow can read") from None
    with opened as image:
        pixels = np.array(image if image.mode == mode else image.convert(mode))
    return pixels[..., None] if pixels.ndim == 2 else pixels


@dataclasses.dataclass(frozen=True)
class Tfds:
    """A prepared TensorFlow Datasets data set, read without TensorFlow.

    Args:
      name: as TFDS writes it: `imagenet2012`, `glue/cola`, `mnist:3.0.1`. The embedded names (`digits`,
        `motion`, `pydocs`, `scenes`) are prepared on first use.
      split: with slices: `train`, `train[:90%]`, `test[100:200]`.
      data_dir: None is `$TFDS_DATA_DIR`, or else `~/tensorflow_datasets`.
      fields: which fields to read; empty reads all. Name them where some are no numbers.
    """

    name: str
    split: str = "train"
    data_dir: str | None = None
    fields: tuple[str, ...] = ()

    def open(self) -> "TfdsReader":
        """Raises UsageError for a data set, split or field that is not there."""
        data_dir = Path(self.data_dir or tfds.core.constants.DATA_DIR).expanduser()
        if self.name in builders.EMBEDDED:
            directory = builders.prepare(self.name, data_dir)
        else:
            directory = _find(self.name, data_dir)
        builder = tfds.builder_from_directory(str(directory))
        if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
            raise UsageError(
                f"{self.name} in {data_dir} is prepared as {builder.info.file_format.value}, which has no "
                f"random access. Prepare it again as array_record: {_how_to_prepare(self.name, data_dir)}"
            )
        known = list(builder.info.features)
        for field in self.fields:
            if field not in known:
                raise UsageError(f"{self.name} has no field {field!r}. {did_you_mean(field, known)}")
        return TfdsReader(builder, self.split, self.fields or tuple(known))


class TfdsReader:
    """Reads one split by TFDS's data source; pictures are decoded here, so that a broken one is named."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str, fields: tuple[str, ...]):
        features = builder.info.features
        # The feature says how many channels there are: among ImageNet's colour pictures some files are grey.
        self._images = {
            field: _MODES.get(features[field].shape[-1], "RGB")
            for field in fields
            if isinstance(features[field], tfds.features.Image) and features[field].np_dtype == np.uint8
        }
        self._plain = [f for f in fields if f not in self._images]
        self._where = f"{builder.info.full_name}, split {split}"
        skipped = {
            name: tfds.decode.SkipDecoding()
            for name in features
            if name in self._images or name not in fields
        }
        try:
            count = builder.info.splits[split].num_examples
            self._records: Any = builder.as_data_source(split, decoders=skipped or None) if count else ()
        except (ValueError, KeyError) as error:  # KeyError's own text is a quoted representation
            raise UsageError(
                f"{builder.info.full_name} has no split {split!r}: {error.args[0]} "
                f"Its splits, which may be sliced as in 'train[:90%]': {', '.join(builder.info.splits)}."
            ) from None
        if not count:
            raise UsageError(f"The split {split!r} of {builder.info.full_name} is empty.")
        self.metadata = _metadata(builder, split)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        record = self._records[index]
        example = {name: record[name] for name in self._plain}
        for name, mode in self._images.items():
            try:
                example[name] = decode_image(record[name], mode)
            except _UNDECODABLE as error:
                raise BadRecord(f"{self._where}, record {index}, field {name}: {error}") from None
        return example


def _metadata(builder: tfds.core.DatasetBuilder, split: str) -> Metadata:
    features = dict(builder.info.features.items())
    label, image = features.get("label"), features.get("image")
    names = tuple(label.names) if isinstance(label, tfds.features.ClassLabel) else ()
    shape = tuple(image.shape) if isinstance(image, tfds.features.Image) else (None,)
    # TFDS writes how many examples and bytes there are beside the data, last of all.
    written = (builder.data_path / "dataset_info.json").read_text()
    identity = f"{builder.data_path}, split {split}: {written}"
    return Metadata(names, None if None in shape else shape, identity)


def _find(name: str, data_dir: Path) -> Path:
    """Returns the directory of a prepared data set, from files alone: no builder code, no network."""
    try:
        return Path(read_only_builder.builder_from_files(name, data_dir=str(data_dir)).data_path)
    except (tfds.core.DatasetNotFoundError, ValueError, OSError):
        there = sorted({path.relative_to(data_dir).parts[0] for path in data_dir.glob("*/**/features.json")})
        raise UsageError(
            f"The data set {name!r} is not prepared in {data_dir}. Prepare it once, where TensorFlow is "
            f"installed: {_how_to_prepare(name, data_dir)} Prepared there: {', '.join(there) or 'none'}. "
            f"Needing no preparation: {', '.join(builders.EMBEDDED)}. "
            f"{did_you_mean(name, {*there, *builders.EMBEDDED})}"
        ) from None


def _how_to_prepare(name: str, data_dir: Path) -> str:
    return f"`tfds build {name} --file_format=array_record --data_dir={data_dir}`."


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """Pictures in `root/<class>/*.png|jpg|jpeg|webp`, decoded when they are asked for.

    Args:
      root: the folder; its sub-folders are the classes, in sorted order.
      mode: "RGB" gives three channels, "L" one.
    """

    root: str
    mode: Literal["RGB", "L"] = "RGB"

    def open(self) -> "ImageFolderReader":
        """Raises UsageError for a folder that is missing or without classes, or a class without pictures."""
        root = Path(self.root).expanduser()
        if not root.is_dir():
            raise UsageError(f"The image folder {root} does not exist.")
        layout = f"It needs {root}/<class>/*.{{{','.join(sorted(s[1:] for s in IMAGE_SUFFIXES))}}}."
        classes = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        if not classes:
            raise UsageError(f"The image folder {root} has no sub-folders, so there are no classes. {layout}")
        files = []
        for label, folder in enumerate(classes):
            found = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise UsageError(f"The class folder {folder} has no pictures. {layout}")
            files += [(path, label) for path in found]
        return ImageFolderReader(files, self.mode, Metadata(tuple(path.name for path in classes)))


class ImageFolderReader:
    """Reads `image` `[H, W, C]` uint8 and `label`."""

    def __init__(self, files: list[tuple[Path, int]], mode: str, metadata: Metadata):
        self._files = files
        self._mode = mode
        self.metadata = metadata

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        path, label = self._files[index]
        try:
            return {"image": decode_image(path.read_bytes(), self._mode), "label": label}
        except _UNDECODABLE as error:
            raise BadRecord(f"{path}: {error}") from None


@dataclasses.dataclass(frozen=True)
class JsonLines:
    """Text documents, one JSON object a line.

    Args:
      path: the file; blank lines are ignored.
      key: the key that holds the text.
    """

    path: str
    key: str = "text"

    def open(self) -> "JsonLinesReader":
        """Raises UsageError for a file that is missing or has no lines."""
        path = Path(self.path).expanduser()
        if not path.is_file():
            raise UsageError(f"The JSON lines file {path} does not exist.")
        reader = JsonLinesReader(path, self.key)
        if not len(reader):
            raise UsageError(f"The JSON lines file {path} has no lines.")
        return reader


class JsonLinesReader:
    """Reads `text` as bytes, by an index of where each line starts.

    The index takes one pass over the file, and 24 bytes a line; it is kept where that took long.
    """

    def __init__(self, path: Path, key: str):
        self._path = path
        self._key = key
        status = path.stat()
        file = f"{path.resolve()}, {status.st_size} bytes of {status.st_mtime_ns}"
        self.metadata = Metadata(identity=f"{file}, key {key}")
        self._lines = kept(f"lines of {file}", self._index)

    def _index(self) -> Int64[np.ndarray, "lines 3"]:
        """Number, offset and bytes of each line that is not blank."""
        lines, offset = array.array("q"), 0
        with self._path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    lines.extend((number, offset, len(line)))
                offset += len(line)
        return np.array(lines, np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Example:
        number, offset, length = self._lines[index].tolist()
        with self._path.open("rb") as file:
            file.seek(offset)
            line = file.read(length).rstrip(b"\r\n")
        try:
            record = json.loads(line)
        except ValueError as error:  # also bytes that are not UTF-8
            raise BadRecord(f"{self._path}, line {number}: {error}") from None
        text = record.get(self._key) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise BadRecord(f"{self._path}, line {number}: no text under the key {self._key!r}")
        return {"text": text.encode(errors="replace")}


KINDS = {
    "arrays": Arrays,
    "image_folder": ImageFolder,
    "in_context_autoregression": Autoregression,
    "in_context_regression": Regression,
    "jsonl": JsonLines,
    "probe": Probe,
    "probe_mixture": ProbeMixture,
    "running_sum": RunningSum,
    "spelled_pictures": SpelledPictures,
    "tfds": Tfds,
    "traces": Traces,
}
