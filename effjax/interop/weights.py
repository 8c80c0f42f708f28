"""Where weights are read from: a safetensors file, a folder of shards, or a mapping of arrays.

A source knows the shape and dtype of every tensor before a byte of data is read, and reads one tensor at a
time straight into memory that the caller made. Nothing is ever unpickled.

The safetensors library checks a header (JSON, dtypes, sizes that agree with shapes, ranges without holes or
overlaps that end where the file ends). What is added here: a limit on the header's size, repeated names, more
axes than numpy has, dtypes that numpy does not have, a message that names the file, and reading by file
offset, since the library hands out copies and the tensors of all layers belong into one array.
"""

import collections
import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import ml_dtypes
import numpy as np
import safetensors

from effjax.errors import RunError, UsageError

Spec = jax.ShapeDtypeStruct
# `Any` stands for arrays: what else is in a mapping is refused with a sentence.
Weights = str | os.PathLike[str] | Mapping[str, Any]

# By the name that a header gives them.
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
    "C64": np.dtype(np.complex64),
}
# Names that the libraries give a file of their own folders, and its index where it is cut into shards.
STEMS = ("model", "diffusion_pytorch_model", "params")

_HEADER_LIMIT = 16 * 2**20  # bytes; about 150,000 tensors
_MAX_AXES = 64  # of a numpy array
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x04")


@runtime_checkable
class Source(Protocol):
    """Tensors by their names in another library; `where` names the file or folder in messages."""

    @property
    def where(self) -> str:
        """The file or folder."""

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Shape and dtype of every tensor."""

    def read(self, name: str, out: np.ndarray) -> None:
        """Reads one tensor into a contiguous array of its shape and dtype."""

    def close(self) -> None:
        """Closes the files."""


def open_weights(weights: Weights) -> Source:
    """Opens weights; only headers are read.

    Args:
      weights: a `.safetensors` file, a folder with one or with shards and their index, or a mapping of names
        to numpy arrays.

    Raises:
      UsageError: for what is not safetensors (with the recipe to convert a pickle elsewhere), what is not
        there, and a folder that holds several models.
      RunError: for a file whose header lies, naming the file and, where there is one, the tensor.
    """
    if isinstance(weights, Mapping):
        return Arrays(weights)
    path = Path(weights)
    if path.suffix in _PICKLES:
        raise UsageError(pickle_refusal(path))
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise UsageError(f"'{path}' is not there: give a .safetensors file, or a folder that holds one.")
    return File(path)


def pickle_refusal(path: Path) -> str:
    """Says why a pickle is not read, and the line that converts it elsewhere."""
    out = path.with_suffix(".safetensors").name
    return (
        f"'{path}' is a pickle, which can run any program while it is read; only .safetensors is read here. "
        f"Convert it where torch is installed and the file is trusted: "
        f'python -c "import torch; from safetensors.torch import save_file; '
        f"s = torch.load('{path.name}', map_location='cpu', weights_only=True); "
        f"s = s.get('state_dict', s.get('model', s)); "
        f"save_file({{k: v.clone().contiguous() for k, v in s.items()}}, '{out}')\""
    )


class Arrays:
    """Weights that are in memory already."""

    where = "the mapping"

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        for name, array in arrays.items():
            if not isinstance(array, np.ndarray):
                raise UsageError(
                    f"weights[{name!r}] is a {type(array).__name__}, not a numpy array. "
                    f"For a torch tensor: t.detach().cpu().numpy()."
                )
            if array.dtype.newbyteorder("=") not in DTYPES.values():
                raise UsageError(f"weights[{name!r}] is of dtype {array.dtype}, which holds no weights.")
        self._arrays = arrays
        self.specs = {name: Spec(a.shape, a.dtype.newbyteorder("=")) for name, a in arrays.items()}

    def read(self, name: str, out: np.ndarray) -> None:
        """Copies one array."""
        np.copyto(out, self._arrays[name])

    def close(self) -> None:
        """Does nothing: the arrays are the caller's."""


class Renamed:
    """A source whose names are rewritten, so that one name map reads several spellings of a checkpoint."""

    def __init__(self, source: Source, renames: Sequence[tuple[str, str]]) -> None:
        self.where = source.where
        self._source = source
        self._names: dict[str, str] = {}
        for name in source.specs:
            new = name
            for pattern, replacement in renames:
                new = re.sub(pattern, replacement, new)
            if new in self._names:
                raise UsageError(
                    f"{self.where} holds both {self._names[new]!r} and {name!r}, one tensor twice."
                )
            self._names[new] = name
        self.specs = {new: source.specs[name] for new, name in self._names.items()}

    def read(self, name: str, out: np.ndarray) -> None:
        """Reads one tensor by its new name."""
        self._source.read(self._names[name], out)

    def close(self) -> None:
        """Closes the source."""
        self._source.close()


class File:
    """One safetensors file; tensors are read at their offsets."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.where = f"'{os.fspath(path)}'"
        path = Path(path)
        self._start, header = _checked_header(path)
        self.specs = {name: _spec(self.where, name, entry) for name, entry in header.items()}
        self._offsets = {name: entry["data_offsets"][0] for name, entry in header.items()}
        self._file = path.open("rb", buffering=0)

    def read(self, name: str, out: np.ndarray) -> None:
        """Reads one tensor into `out`."""
        self._file.seek(self._start + self._offsets[name])
        rest = memoryview(out.reshape(-1).view(np.uint8).data)
        while rest:
            # One call gives at most 2 GiB on Linux.
            count = self._file.readinto(rest)
            if not count:
                raise RunError(
                    f"{self.where} ended while {name!r} was read: it was changed or cut meanwhile."
                )
            rest = rest[count:]

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class Shards:
    """A folder of safetensors files and the index that says which holds what."""

    def __init__(self, index: Path) -> None:
        self.where = f"'{index.parent}'"
        places = _checked_index(index)
        self._files: dict[str, File] = {}
        self._places = places
        self.specs: dict[str, Spec] = {}
        try:
            for shard in dict.fromkeys(places.values()):
                self._add(index, shard)
        except BaseException:
            self.close()
            raise
        lost = [name for name in places if name not in self.specs]
        if lost:
            self.close()
            raise RunError(
                f"'{index}' says that {lost[0]!r} is in '{places[lost[0]]}', which does not hold it"
                + (f" (and {len(lost) - 1} more)." if lost[1:] else ".")
            )

    def _add(self, index: Path, shard: str) -> None:
        path = index.parent / shard
        if not path.is_file():
            raise UsageError(f"'{index}' names the shard '{shard}', which is not in the folder.")
        file = self._files[shard] = File(path)
        for name, spec in file.specs.items():
            if self._places.get(name) != shard:
                told = f"in '{self._places[name]}'" if name in self._places else "nowhere"
                raise RunError(f"'{path}' holds {name!r}, which '{index.name}' says is {told}.")
            self.specs[name] = spec

    def read(self, name: str, out: np.ndarray) -> None:
        """Reads one tensor from its shard."""
        self._files[self._places[name]].read(name, out)

    def close(self) -> None:
        """Closes the shards."""
        for file in self._files.values():
            file.close()


def _open_folder(folder: Path) -> Source:
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        return Shards(indices[0])
    files = sorted(folder.glob("*.safetensors"))
    usual = [file for file in files if file.stem in STEMS]
    if not indices and len(usual or files) == 1:
        return File((usual or files)[0])
    if indices or files:
        found = ", ".join(f"'{path.name}'" for path in (indices or files)[:8])
        raise UsageError(f"'{folder}' holds several sets of weights, {found}: name one of the files.")
    pickles = sorted(path for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        raise UsageError(pickle_refusal(pickles[0]))
    raise UsageError(f"'{folder}' holds no .safetensors file.")


def _checked_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Returns where the data starts, and `{name: entry}`, once the library and we find nothing wrong."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        if head.startswith(_PICKLE_STARTS):
            raise UsageError(pickle_refusal(path))
        length = int.from_bytes(head, "little")
        if size < 8 or length > size - 8:
            raise RunError(
                f"'{path}' is no whole safetensors file: it has {size} bytes and its header claims {length}. "
                f"Download or copy it again."
            )
        if length > _HEADER_LIMIT:
            raise RunError(f"'{path}' claims a header of {length} bytes; the limit here is {_HEADER_LIMIT}.")
        text = file.read(length)
    try:
        with safetensors.safe_open(path, framework="np", backend="pread"):
            pass
    except (safetensors.SafetensorError, OSError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise RunError(f"'{path}' is no sound safetensors file: {_short(reason)}.") from None
    try:
        header = json.loads(text, object_pairs_hook=lambda pairs: _unrepeated(path, pairs))
    except (ValueError, RecursionError) as error:
        raise RunError(f"'{path}' is no sound safetensors file: {_short(str(error))}.") from None
    header.pop("__metadata__", None)
    return 8 + length, header


def _checked_index(index: Path) -> dict[str, str]:
    """Returns `{tensor: shard}`; a shard is the name of a file in the same folder and nothing else."""
    try:
        content = json.loads(index.read_bytes())
        places = content["weight_map"]
        sound = isinstance(places, dict) and all(isinstance(shard, str) for shard in places.values())
    except (ValueError, KeyError, TypeError, RecursionError):
        sound = False
    if not sound or not places:
        raise RunError(f"'{index}' is no index of shards: it holds no weight_map of names to file names.")
    for name, shard in places.items():
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise RunError(
                f"'{index}' puts {_short(name)!r} in {_short(shard)!r}, no .safetensors of this folder."
            )
    return places


def _unrepeated(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        [(twice, _)] = collections.Counter(name for name, _ in pairs).most_common(1)
        raise RunError(f"'{path}' has {_short(twice)!r} twice in its header.")
    return result


def _spec(where: str, name: str, entry: Mapping[str, Any]) -> Spec:
    shape = tuple(entry["shape"])
    if len(shape) > _MAX_AXES:
        raise RunError(f"{where}: {_short(name)!r} has {len(shape)} axes; an array has {_MAX_AXES} at most.")
    if entry["dtype"] not in DTYPES:
        raise UsageError(f"{where}: {_short(name)!r} is of type {entry['dtype']}, which is not read here.")
    return Spec(shape, DTYPES[entry["dtype"]])


def _short(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."


@contextlib.contextmanager
def closing(source: Source) -> Iterator[Source]:
    """Closes a source at the end of a `with`."""
    try:
        yield source
    finally:
        source.close()
