"""Writes safetensors files of any size with one tensor in memory at a time.

    8 bytes: length of the header, little endian; the header, JSON; the tensors at the offsets it gives

The safetensors library writes a file only from all of its tensors at once. Here the header is made from
shapes and dtypes, and each tensor is written to its place when it comes, in any order.
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from effjax.errors import RunError, UsageError
from effjax.interop.weights import DTYPES, Spec

Progress = Callable[[int, int], None]  # bytes so far, bytes in all

SHARD_BYTES = 5 * 10**9  # of a file, before a set of weights is cut into several
_CODES = {dtype: code for code, dtype in DTYPES.items()}


def write_weights(
    folder: Path,
    stem: str,
    specs: Mapping[str, Spec],
    tensors: Iterable[tuple[str, np.ndarray]],
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Writes tensors into `<stem>.safetensors`, or into shards and their index where they are larger.

    Args:
      folder: an existing folder; whoever calls sees to it that nobody reads there yet.
      stem: `model`, `diffusion_pytorch_model` or `params`.
      specs: shape and dtype of every tensor.
      tensors: each of them once, in any order.
      shard_bytes: size of a file that is not exceeded, unless one tensor alone does.

    Returns:
      The files written, the index last where there is one.
    """
    shards = _cut(specs, shard_bytes)
    names = [f"{stem}.safetensors"]
    if len(shards) > 1:
        names = [f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    places: dict[str, tuple[IO[bytes], int]] = {}
    left = set(specs)
    with contextlib.ExitStack() as stack:
        for name, shard in zip(names, shards, strict=True):
            file: IO[bytes] = stack.enter_context((folder / name).open("wb"))
            for tensor, offset in _write_header(file, {key: specs[key] for key in shard}).items():
                places[tensor] = file, offset
        for tensor, array in tensors:
            if Spec(array.shape, array.dtype) != specs[tensor]:
                raise RunError(
                    f"{tensor!r} is {array.shape} {array.dtype}, and was announced as {specs[tensor]}."
                )
            file, offset = places[tensor]
            file.seek(offset)
            # A stack of layers that is a transposed view is made contiguous a layer at a time.
            for part in [array] if array.flags.c_contiguous or array.ndim < 3 else array:
                file.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
            left.discard(tensor)
        if left:
            raise RunError(f"{len(left)} tensors were announced and did not come: {sorted(left)[:3]}.")
    files = [folder / name for name in names]
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(map(_bytes, specs.values()))},
            "weight_map": {t: name for name, shard in zip(names, shards, strict=True) for t in shard},
        }
        files.append(folder / f"{stem}.safetensors.index.json")
        files[-1].write_text(json.dumps(index, indent=2) + "\n")
    return files


def counted(
    specs: Mapping[str, Spec], tensors: Iterable[tuple[str, np.ndarray]], progress: Progress | None
) -> Iterator[tuple[str, np.ndarray]]:
    """Hands tensors on, and tells `progress` how many bytes of all of them came through."""
    done, total = 0, sum(map(_bytes, specs.values()))
    for name, array in tensors:
        yield name, array
        done += array.nbytes
        if progress:
            progress(done, total)


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder that appears whole or not at all: it is filled under a hidden name and renamed at the end.

    Raises:
      UsageError: where `folder` exists and holds something.
      RunError: where the file system refuses, naming the folder.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"'{folder}' exists already: choose another --out, or move it away.")
    hidden = folder.absolute().parent / f".{folder.absolute().name}.{os.getpid()}.tmp"
    try:
        hidden.mkdir(parents=True)
        yield hidden
        for path in [*hidden.iterdir(), hidden]:
            _to_disk(path)
        if folder.exists():
            folder.rmdir()
        hidden.rename(folder)
        _to_disk(folder.absolute().parent)
    except OSError as error:
        raise RunError(f"'{folder}' could not be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cut(specs: Mapping[str, Spec], shard_bytes: int) -> list[list[str]]:
    """Names for each file, in their order."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + _bytes(spec) > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _bytes(spec)
    return shards


def _write_header(file: IO[bytes], specs: Mapping[str, Spec]) -> dict[str, int]:
    """Writes the header; returns where each tensor's bytes go. Wide dtypes come first, so all are aligned."""
    # `format` is what transformers asks for before it reads a file.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, spec in sorted(specs.items(), key=lambda item: -np.dtype(item[1].dtype).itemsize):
        if np.dtype(spec.dtype) not in _CODES:
            raise UsageError(f"{name!r} is of dtype {spec.dtype}, which safetensors does not hold.")
        end = offset + _bytes(spec)
        code = _CODES[np.dtype(spec.dtype)]
        header[name] = {"dtype": code, "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    start = 8 + len(text)
    file.truncate(start + offset)
    return {name: start + header[name]["data_offsets"][0] for name in specs}


def _bytes(spec: Spec) -> int:
    return math.prod(spec.shape) * np.dtype(spec.dtype).itemsize
