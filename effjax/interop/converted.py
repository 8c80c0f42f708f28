"""Converted weights on disk: our own paths, and the model they belong to.

<folder>/params.safetensors     tensors by path, `blocks/mixer/query/kernel`, or shards and their index;
                                those of other collections behind its name, `batch_stats:head/norm/mean`
<folder>/config.json            `model`: the section of an effjax config that builds the model
                                `inputs`: shapes of what it was shaped for
                                `source`, `library_config`: where the weights come from
"""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from effjax import models
from effjax.compress.storage import kinds as storage
from effjax.compress.storage.trees import boxed_like, stored_in
from effjax.config import build_kind, section_of
from effjax.errors import RunError, UsageError
from effjax.interop.load import family_of, fill
from effjax.interop.match import compare
from effjax.interop.names import Name, resolve
from effjax.interop.resize import Request
from effjax.interop.variables import PARAMS, flatten, parameters_alone
from effjax.interop.weights import Spec, closing, open_weights
from effjax.interop.write import SHARD_BYTES, Progress, counted, new_folder, write_weights
from effjax.matching import path_of


def save_converted(
    folder: str | os.PathLike[str],
    model: nn.Module,
    params: Any,
    source: str,
    config: Mapping[str, Any] | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Writes a model and its parameters; the folder appears whole or not at all.

    Args:
      folder: must be empty or not exist.
      model: one that `effjax.models.KINDS` can build.
      params: its parameters, or all its variables by collection where it has others.
      source: what they were loaded from, `timm:vit_small_patch16_224`.
      config: the other library's configuration that was given with it.
      shard_bytes: size of a file that is not exceeded, unless one leaf alone does.
      progress: called with the bytes written so far and in all.

    Raises:
      UsageError: where the folder holds something, or the model is in no table of kinds.
      RunError: where the disk refuses.
    """
    family = family_of(source)
    inputs = family.inputs(model, {**family.defaults, **(config or {})})
    content = {
        "model": section(model, models.KINDS),
        "inputs": [{"shape": list(spec.shape), "dtype": spec.dtype.name} for spec in inputs],
        "source": source,
        "library_config": dict(config or {}),
    }
    stored = stored_in(params.get(PARAMS, params))
    if stored:
        layouts = {path: leaf.layout for path, leaf in stored.items()}  # type: ignore[attr-defined]
        content["storage"] = {path: section(layout, storage.KINDS) for path, layout in layouts.items()}
    leaves = flatten(params)
    specs = {path: Spec(leaf.shape, np.dtype(leaf.dtype)) for path, leaf in leaves.items()}
    tensors = ((path, np.asarray(leaf)) for path, leaf in leaves.items())
    with new_folder(folder) as hidden:
        write_weights(hidden, "params", specs, counted(specs, tensors, progress), shard_bytes)
        (hidden / "config.json").write_text(json.dumps(content, indent=2) + "\n")


def load_converted(
    folder: str | os.PathLike[str], *, allow_nan: bool = False, progress: Progress | None = None
) -> tuple[nn.Module, Any, str]:
    """Reads what `save_converted` wrote.

    Returns:
      The model, its parameters as numpy arrays, and the source they came from.

    Raises:
      UsageError: for a folder that is none of these, whose parameters are not those of its model, or that
        holds more variables than parameters.
      RunError: for a damaged file, or a tensor with NaN in it.
    """
    model, variables, source = load_converted_variables(folder, allow_nan=allow_nan, progress=progress)
    return model, parameters_alone(variables, f"the model in '{folder}'", "load_converted_variables"), source


def load_converted_variables(
    folder: str | os.PathLike[str], *, allow_nan: bool = False, progress: Progress | None = None
) -> tuple[nn.Module, dict[str, Any], str]:
    """Like `load_converted`, with the variables of every collection."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise UsageError(f"'{folder}' holds no converted weights: it has no config.json.")
    try:
        content = json.loads(file.read_bytes())
        sections = content["model"], content["source"]
        inputs = tuple(jax.ShapeDtypeStruct(i["shape"], i["dtype"]) for i in content["inputs"])
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"'{file}' is not what experiments.convert writes: {error!r}.") from None
    model = build_kind(models.KINDS, sections[0], f"{file}: model")
    layouts = {
        path: build_kind(storage.KINDS, told, f"{file}: storage.{path}")
        for path, told in content.get("storage", {}).items()
    }
    shapes = _shapes(model, inputs, layouts)
    variables = read_variables(folder, shapes, "its own config.json", allow_nan=allow_nan, progress=progress)
    return model, variables, sections[1]


def _shapes(model: nn.Module, inputs: tuple[Any, ...], layouts: Mapping[str, Any]) -> Any:
    """Shapes and dtypes of a model's variables with kernels in these layouts."""

    def init() -> Any:
        variables = model.init(jax.random.key(0), *(jnp.zeros(spec.shape, spec.dtype) for spec in inputs))
        return meta.unbox({**variables, PARAMS: boxed_like(variables[PARAMS], layouts)})

    return jax.eval_shape(init)


def read_variables(
    folder: str | os.PathLike[str],
    shapes: Any,
    of: str,
    *,
    dtype: Any = None,
    allow_nan: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Reads variables that lie under our own paths, for any definition that has these leaves.

    Args:
      folder: what `save_converted` wrote.
      shapes: shapes and dtypes of the variables, by collection.
      of: what the leaves belong to, for messages.
      dtype: of all parameters, with running averages in float32; None keeps each as it is.
      allow_nan: whether a tensor may hold NaN.
      progress: called with the bytes read so far and in all.

    Returns:
      The variables as numpy arrays, in a tree like `shapes`.

    Raises:
      UsageError: where they are not the same, in one message with every path, its expected and found shape.
      RunError: for a damaged file, or a tensor with NaN in it.
    """
    with closing(open_weights(folder)) as opened:
        plan = _same_leaves(f"{opened.where} for {of}", opened.specs, shapes)
        filled = fill(plan, opened, dtype, allow_nan, progress)
    shapes = meta.unbox(shapes)
    shapes = shapes if PARAMS in shapes else {PARAMS: shapes}
    inner = {f"{path}/" for path in stored_in(shapes[PARAMS])}

    def leaf(collection: str, key_path: Any, spec: Any) -> np.ndarray:
        path = path_of(key_path) if collection == PARAMS else f"{collection}:{path_of(key_path)}"
        # What is stored otherwise has dtypes of its own.
        stored = any(path.startswith(prefix) for prefix in inner)
        return filled[path].astype(spec.dtype) if stored else filled[path]

    return {
        name: jax.tree_util.tree_map_with_path(functools.partial(leaf, name), tree)
        for name, tree in shapes.items()
    }


def check_variables(variables: Any, shapes: Any, what: str) -> None:
    """Refuses variables that are others than those wanted.

    Args:
      variables: by collection.
      shapes: those that are wanted.
      what: whose they are and for whom, for the message.

    Raises:
      UsageError: with every path, its expected and found shape.
    """
    leaves = flatten(variables)
    _same_leaves(
        what, {path: Spec(leaf.shape, np.dtype(leaf.dtype)) for path, leaf in leaves.items()}, shapes
    )


def _same_leaves(what: str, specs: Mapping[str, Spec], shapes: Any) -> Any:
    leaves = flatten(shapes)
    rows = [Name(path, path) for path in leaves]
    entries, _ = resolve(rows, leaves)
    return compare(what, specs, rows, entries, (), request=Request(), replace=False)


def section(part: Any, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """The config section that builds a module or dataclass again, defaults left out.

    Args:
      part: the module.
      kinds: the table that its `kind` stands in.

    Raises:
      UsageError: for a class in no table, or a field that a config cannot hold.
    """
    kind = next((name for name, known in kinds.items() if known is type(part)), None)
    if kind is None:
        raise UsageError(
            f"{type(part).__name__} is none of the kinds {sorted(kinds)}: no config can name it."
        )
    return {"kind": kind, **_fields(part)}


def _fields(part: Any) -> dict[str, Any]:
    result = {}
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if not field.init or field.name in ("parent", "name") or value == field.default:
            continue
        result[field.name] = _each(value, functools.partial(_held, type(part).__name__, field))
    return result


def _held(owner: str, field: dataclasses.Field[Any], value: Any) -> Any:
    """A field may hold a part with a `kind`, or something plain in its place."""
    if "kinds" in field.metadata and dataclasses.is_dataclass(value):
        return section(value, field.metadata["kinds"])
    return _plain(value, owner, field.name)


def _each(value: Any, of_one: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_each(item, of_one) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _each(item, of_one) for key, item in value.items()}
    return of_one(value)


def _plain(value: Any, owner: str, name: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if section_of(value):
        return {key: _plain(value[key], owner, name) for key in value}
    if dataclasses.is_dataclass(value):
        return _fields(value)
    raise UsageError(f"{owner}.{name} is {value!r}, which a config cannot hold.")
