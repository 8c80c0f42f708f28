"""Parameters of ours as the tensors of another library."""

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np

from effjax.errors import UsageError
from effjax.interop.load import family_of
from effjax.interop.names import Entry
from effjax.interop.variables import flatten
from effjax.interop.weights import Spec
from effjax.interop.write import SHARD_BYTES, Progress, counted, new_folder, write_weights


def export(
    model: nn.Module, params: Any, target: str, *, like: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """Names and lays out parameters as another library has them.

    Args:
      model: the definition that the parameters belong to.
      params: its parameters, or all its variables by collection where it has others; numpy or jax arrays,
        boxed or not.
      target: `timm:<architecture>`, `transformers:<model_type>` or `diffusers:<class name>`.
      like: names that the tensors are to have, where the library spells them in several ways: those of a
        `state_dict()`, say. By default they are spelled as in its files.

    Returns:
      `{their name: contiguous array}`, in the dtype of the parameters. What was loaded and not changed comes
      back bit by bit. Tensors that loading leaves out (buffers, tied copies) are not made again.

    Raises:
      UsageError: for an unknown target, or a model that it has no names for.
    """
    leaves, entries = _resolved(model, params, target, like)
    return dict(_tensors(leaves, entries))


def export_to(
    folder: str | os.PathLike[str],
    model: nn.Module,
    params: Any,
    target: str,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> list[str]:
    """Writes what `export` gives as safetensors, one tensor in memory at a time.

    The folder holds `model.safetensors` (`diffusion_pytorch_model.safetensors` for diffusers), or shards and
    their index where the model is larger than `shard_bytes`. It appears whole or not at all.

    Args:
      folder: must be empty or not exist.
      model: the definition that the parameters belong to.
      params: its parameters or variables.
      target: as for `export`.
      shard_bytes: size of a file that is not exceeded.
      progress: called with the bytes written so far and in all.

    Returns:
      Names of the files written.
    """
    leaves, entries = _resolved(model, params, target)
    specs = {
        name: Spec(shape, np.dtype(leaves[entry.row.our_paths[0]].dtype))
        for entry in entries
        for index in entry.indices()
        for name, shape in zip(entry.names(index), entry.shapes, strict=True)
    }
    stem = "diffusion_pytorch_model" if target.startswith("diffusers:") else "model"
    tensors = counted(specs, _tensors(leaves, entries), progress)
    with new_folder(folder) as hidden:
        return [Path(file).name for file in write_weights(hidden, stem, specs, tensors, shard_bytes)]


def _resolved(
    model: nn.Module, params: Any, target: str, like: Collection[str] = ()
) -> tuple[dict[str, Any], list[Entry]]:
    leaves = flatten(params)
    try:
        _, entries, _ = family_of(target).resolved(model, leaves, like)
    except (UsageError, AttributeError) as error:
        # A family reads the fields of its own models, which those of another may lack.
        raise UsageError(f"{target} has no names for this {type(model).__name__}: {error}") from None
    return leaves, entries


def _tensors(leaves: dict[str, Any], entries: list[Entry]) -> Iterator[tuple[str, np.ndarray]]:
    for entry in entries:
        ours = [np.asarray(leaves[path]) for path in entry.row.our_paths]
        for index in entry.indices():
            here: Any = (*index, ...)
            theirs = entry.to_theirs([leaf[here] for leaf in ours])
            for name, array in zip(entry.names(index), theirs, strict=True):
                yield name, np.ascontiguousarray(array)
