"""Weights of another library as one of our models and its parameters.

    model, params = load_pretrained("timm:vit_small_patch16_224", "model.safetensors")
    logits = model.apply({"params": params}, images)

    model, variables = load_variables("timm:nextvit_small", "model.safetensors")
    logits = model.apply(variables, images)

First everything is compared, names and shapes and dtypes, from headers alone; then memory is made and tensors
are read into it one at a time. Variables are numpy arrays, most of them transposed views of memory that is
laid out as in the file: a tensor is read once, straight to where it stays, and goes to a device when it is
used. `export` reads the same memory back, which is why a round trip is exact.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from effjax.errors import RunError, UsageError, did_you_mean
from effjax.interop.families import FAMILIES
from effjax.interop.family import Family
from effjax.interop.match import Plan, Step, compare
from effjax.interop.quantised import Packed, kernels_of, places_of
from effjax.interop.resize import Request
from effjax.interop.variables import PARAMS, collection_of, flatten, parameters_alone, unflatten
from effjax.interop.weights import Renamed, Source, Weights, closing, open_weights
from effjax.interop.write import Progress

Report = Callable[[str], None]
ReadInto = Callable[[str, np.ndarray], None]


def family_of(source: str) -> Family:
    """Looks up `timm:<architecture>`, `transformers:<model_type>` or `diffusers:<class name>`.

    A pretrained tag of timm (`timm:vit_tiny_patch16_224.augreg_in21k`) names weights, not an architecture,
    and is left out.
    """
    library, _, name = source.partition(":")
    key = f"{library}:{name.partition('.')[0]}" if library == "timm" else source
    if key not in FAMILIES:
        raise UsageError(f"{source!r} is not known here. {did_you_mean(key, FAMILIES)}")
    return FAMILIES[key]


def load_pretrained(
    source: str,
    weights: Weights,
    config: Mapping[str, Any] | None = None,
    *,
    classes: str = "keep",
    dtype: Any = None,
    allow_nan: bool = False,
    source_grid: tuple[int, int] | None = None,
    report: Report | None = None,
    progress: Progress | None = None,
) -> tuple[nn.Module, Any]:
    """Builds a model from another library's configuration and fills it with that library's weights.

    Args:
      source: `timm:<architecture>`, `transformers:<model_type>` or `diffusers:<class name>`.
      weights: a `.safetensors` file, a folder with one or with shards and their index, or a mapping of names
        to numpy arrays.
      config: the other library's configuration: keyword arguments of `timm.create_model`, or the content of
        config.json; None takes the config.json of the folder of weights, if there is one. Where it asks for
        another picture or patch size than the weights have, position tables, relative position biases and
        patch kernels are resized.
      classes: `"keep"` refuses a classifier of another number of classes; `"replace"` starts it anew as the
        model itself would.
      dtype: of all parameters; None keeps each as it is. Running averages are float32 wherever a dtype is
        asked for: rounded to bfloat16 they shift every activation.
      allow_nan: whether a tensor may hold NaN.
      source_grid: rows and columns of the position table in the weights, where these are not equal.
      report: told, in a sentence, of each tensor that was resized, replaced or left out.
      progress: called with the bytes read so far and in all.

    Returns:
      The model, and its parameters: the tree of `model.init(...)["params"]`, unboxed, as numpy arrays.

    Raises:
      UsageError: for an unknown source, a configuration that is not understood, a model that has more
        variables than parameters, and weights that do not fit, in one message with every name, its expected
        and its found shape.
      RunError: for a damaged file, or a tensor with NaN in it.
    """
    options: dict[str, Any] = dict(dtype=dtype, allow_nan=allow_nan, report=report, progress=progress)
    model, variables = load_variables(
        source, weights, config, classes=classes, source_grid=source_grid, **options
    )
    return model, parameters_alone(variables, f"the model of {source}", "load_variables")


def load_variables(
    source: str,
    weights: Weights,
    config: Mapping[str, Any] | None = None,
    *,
    classes: str = "keep",
    dtype: Any = None,
    allow_nan: bool = False,
    source_grid: tuple[int, int] | None = None,
    quantised: str = "codes",
    report: Report | None = None,
    progress: Progress | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Like `load_pretrained`, with the variables of every collection.

    Where the configuration has a `quantization_config` of GPTQ or AWQ (see `effjax.interop.packed`), kernels
    are `uniform` codes, as `experiments.compress` leaves them, and the same to the bit. `quantised="whole"`
    reads the weights that they stand for, in float32.

    Returns:
      The model, and its variables: the tree of `model.init(...)`, unboxed, as numpy arrays.
    """
    if quantised not in ("codes", "whole"):
        raise UsageError(f"quantised is {quantised!r}. {did_you_mean(quantised, ['codes', 'whole'])}")
    if classes not in ("keep", "replace"):
        raise UsageError(f"classes is {classes!r}. {did_you_mean(classes, ['keep', 'replace'])}")
    wanted = None if dtype is None else _floating(dtype)
    family = family_of(source)
    config = {**family.defaults, **((config_of(weights) if config is None else config) or {})}
    with closing(open_weights(weights)) as opened:
        opened = Renamed(opened, family.renames) if family.renames else opened
        packed = Packed(opened, config["quantization_config"]) if config.get("quantization_config") else None
        opened = packed or opened
        if family.complete:
            config = family.complete(config, opened.specs)
        model = family.build(config)
        inputs = family.inputs(model, config)
        leaves = leaf_specs(model, inputs)
        rows, entries, absent = family.resolved(model, leaves, opened.specs)
        plan = compare(
            f"{opened.where} for {source}",
            opened.specs,
            rows,
            entries,
            absent,
            request=Request(_picture(inputs), source_grid),
            replace=classes == "replace",
        )
        if report:
            for line in plan.notes:
                report(line)
        plan, coded = _parted(plan, packed if quantised == "codes" else None)
        filled: dict[str, Any] = dict(fill(plan, opened, wanted, allow_nan, progress))
        if packed is not None and coded:

            def read(step: Step, source: Source) -> Iterable[np.ndarray]:
                return fill(Plan((step,), (), ()), source, None, allow_nan, None).values()

            filled |= kernels_of(coded, packed, read, places_of(model, inputs))
    if plan.fresh:
        filled.update(_initial(model, inputs, plan.fresh))
    return model, unflatten({path: filled[path] for path in leaves})


def _parted(plan: Plan, packed: Packed | None) -> tuple[Plan, tuple[Step, ...]]:
    """The plan without the rows whose tensors are packed layers, and these."""
    if packed is None:
        return plan, ()
    coded = tuple(step for step in plan.steps if all(name in packed.layers for name in step.tensors()))
    return dataclasses.replace(plan, steps=tuple(step for step in plan.steps if step not in coded)), coded


def config_of(weights: Weights) -> dict[str, Any] | None:
    """The config.json in a folder of weights, or None."""
    path = None if isinstance(weights, Mapping) else Path(weights) / "config.json"
    return parse_config(path.read_bytes(), f"'{path}'") if path and path.is_file() else None


def parse_config(text: bytes | str, where: str) -> dict[str, Any]:
    """Reads the configuration of another library from JSON.

    timm's own repositories keep the keyword arguments of a model under `model_args`.

    Raises:
      UsageError: where it is not a JSON object, naming `where`.
    """
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not JSON: {error}.") from None
    if not isinstance(config, dict):
        raise UsageError(f"{where} is not a JSON object of names and values.")
    if "architecture" in config:
        kept = {key: config[key] for key in ("num_classes", "global_pool") if key in config}
        return {**kept, **config.get("model_args", {})}
    return config


def leaf_specs(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Any]:
    """Shapes and dtypes of a model's variables by path; nothing is computed."""
    return flatten(jax.eval_shape(model.init, jax.random.key(0), *inputs))


def contains_nan(array: np.ndarray) -> bool:
    """Whether a contiguous array holds NaN, in pieces that fit a cache and by bits where that is faster."""
    bits = _NAN_ABOVE.get(array.dtype.name)
    flat = array.reshape(-1)
    if bits is None:
        return array.dtype.kind in "fcV" and bool(np.isnan(flat).any())
    word, infinity = bits
    flat = flat.view(word)
    magnitude = word(np.iinfo(word).max >> 1)
    piece = 2**18 // flat.itemsize
    return any(
        flat.size and int((flat[i : i + piece] & magnitude).max()) > infinity
        for i in range(0, flat.size, piece)
    )


# Without its sign, a number whose bits are above those of infinity is NaN.
_NAN_ABOVE: dict[str, tuple[Any, int]] = {
    "float64": (np.uint64, 0x7FF0000000000000),
    "float32": (np.uint32, 0x7F800000),
    "float16": (np.uint16, 0x7C00),
    "bfloat16": (np.uint16, 0x7F80),
    "float8_e5m2": (np.uint8, 0x7C),
    "float8_e4m3fn": (np.uint8, 0x7E),
}


def fill(
    plan: Plan, source: Source, dtype: Any, allow_nan: bool, progress: Progress | None
) -> dict[str, np.ndarray]:
    """Reads every tensor of a plan; returns our leaves by path."""
    total = sum(_bytes(source.specs[name]) for step in plan.steps for name in step.tensors())
    done = 0
    filled: dict[str, np.ndarray] = {}

    def read(name: str, out: np.ndarray) -> None:
        nonlocal done
        source.read(name, out)
        if not allow_nan and contains_nan(out):
            raise RunError(
                f"{source.where}: {name!r} holds NaN, as weights of a run that diverged or of a damaged file "
                f"do. Load with allow_nan=True to take it as it is."
            )
        done += out.nbytes
        if progress:
            progress(done, total)

    for step in plan.steps:
        straight = step.entry.viewable and not step.changes
        wanted = _wanted(step, dtype)
        leaves = (_read_straight if straight else _read_copying)(step, source, wanted, read)
        filled.update(zip(step.entry.row.our_paths, leaves, strict=True))
    return filled


def _wanted(step: Step, dtype: Any) -> Any:
    """The dtype of a step's leaves: parameters take what was asked for, running averages stay exact."""
    if dtype is None or not jnp.issubdtype(step.dtype, jnp.floating):
        return step.dtype
    return dtype if collection_of(step.entry.row.our_paths[0]) == PARAMS else np.dtype(np.float32)


def _read_straight(step: Step, source: Source, dtype: Any, read: ReadInto) -> list[np.ndarray]:
    """Reads into memory laid out as theirs; ours are views of it."""
    entry = step.entry
    memory = np.empty((*entry.counts, *entry.joined), dtype)
    for index in entry.indices():
        for name, cut in zip(entry.names(index), entry.slices(), strict=True):
            here: Any = (*index, *cut) if len(entry.shapes) > 1 else (*index, ...)
            part = memory[here]
            if part.flags.c_contiguous and dtype == step.dtype:
                read(name, part)
            else:
                whole = np.empty(part.shape, step.dtype)
                read(name, whole)
                part[...] = whole
    return entry.to_ours(memory)


def _read_copying(step: Step, source: Source, dtype: Any, read: ReadInto) -> list[np.ndarray]:
    """Reads one tensor at a time, changes its size, layout and dtype, and copies it to its place."""
    entry = step.entry
    ours = [np.empty((*entry.counts, *shape), dtype) for shape in entry.ours]
    for index in entry.indices():
        parts = []
        for name in entry.names(index):
            part = np.empty(source.specs[name].shape, step.dtype)
            read(name, part)
            parts.append(step.changes[name](part) if name in step.changes else part)
        here: Any = (*index, ...)
        joined = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=entry.row.axis)
        for leaf, piece in zip(ours, entry.to_ours(joined), strict=True):
            leaf[here] = piece
    return ours


def _initial(model: nn.Module, inputs: tuple[Any, ...], paths: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The values a fresh model would start these leaves at; what they do not need is never computed."""

    def some(key: Any) -> dict[str, Any]:
        arrays = jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), inputs)
        leaves = flatten(model.init(key, *arrays))
        return {path: leaves[path] for path in paths}

    return jax.tree.map(np.array, jax.jit(some)(jax.random.key(0)))


def _floating(dtype: Any) -> Any:
    """A dtype for parameters."""
    try:
        wanted = jnp.dtype(dtype)
    except TypeError:
        wanted = None
    if wanted is None or not jnp.issubdtype(wanted, jnp.floating):
        raise UsageError(f"dtype is {dtype!r}; parameters are float32, bfloat16, float16 or the like.")
    return wanted


def _picture(inputs: tuple[Any, ...]) -> tuple[int, int] | None:
    """Height and width, where the first input is a batch of pictures."""
    shape = inputs[0].shape
    return (shape[1], shape[2]) if len(shape) == 4 else None


def _bytes(spec: Any) -> int:
    return int(np.prod(spec.shape, dtype=np.int64)) * np.dtype(spec.dtype).itemsize
