"""Kernels of codes as another library's packed layers, and back; the layouts are in `effjax.interop.packed`.

    transformers:llama      model.layers.0.mlp.up_proj.{qweight, qzeros, scales, g_idx}   instead of `.weight`

One name map serves here too. Codes, scales and zeros stand in the shape of the kernel and go through its row,
as weights do; so does the number of each input, which says whether what comes out is a linear layer `[o, i]`
in the order that groups need. What no packed layer can be is refused with a sentence: tables, layers that
torch stores the other way round, other layouts than `uniform`, and rounded inputs.

config.json gets `quantization_config`. Layers whose bits or groups are not those of most stand under
`dynamic` (GPTQModel and vLLM read it, optimum does not), and linear layers of the blocks that are no codes
under `modules_in_block_to_quantize` and `dynamic` (gptq) or `modules_to_not_convert` (awq). Keys are those of
`GPTQConfig` and `AwqConfig` in transformers 5, `utils/quantization_config.py`.
"""

import collections
import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from effjax.compress.storage.matrices import flat
from effjax.compress.storage.packing import unpack as codes_in
from effjax.compress.storage.trees import replaced, stored_in
from effjax.compress.storage.uniform import QTensor, Uniform
from effjax.errors import UsageError
from effjax.interop.match import Step
from effjax.interop.names import Entry
from effjax.interop.packed import FORMATS, PARTS, Format, Linear, measures, unpack
from effjax.interop.weights import Source, Spec
from effjax.layers.stored import Place, Stored, dtype_of, kernels

WHOLE = "--quantised=whole writes the weights that the codes stand for."


def described(variables: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Stored]]:
    """The variables with every stored kernel as its shape, and those kernels by path."""
    stored = stored_in(variables["params"])
    dtype = dtype_of(variables["params"]) if stored else np.dtype(np.float32)
    shapes = {path: Spec(leaf.shape, dtype) for path, leaf in stored.items()}
    return {**variables, "params": replaced(variables["params"], shapes)}, stored


def layers_of(entry: Entry, stored: Mapping[str, Stored]) -> Iterator[tuple[str, Linear]]:
    """The packed layers of a row, by their names.

    Args:
      entry: whose leaves are stored, all or none.
      stored: kernels by path.

    Raises:
      UsageError: where they are no linear layers in codes.
    """
    paths = entry.row.our_paths
    held = [_codes(path, stored.get(path)) for path in paths]
    if any(leaf.layout != held[0].layout for leaf in held):
        raise UsageError(f"{' + '.join(paths)} are one matrix there, and have several layouts here. {WHOLE}")
    for index in entry.indices():
        parts = [_parts(path, leaf, index) for path, leaf in zip(paths, held, strict=True)]
        laid = [entry.to_theirs([part[i] for part in parts]) for i in range(4)]
        for name, codes, scale, zero, at in zip(entry.names(index), *laid, strict=True):
            ins = codes.shape[-1]
            if codes.ndim != 2 or not name.endswith(".weight") or not (at == np.arange(ins)[None]).all():
                raise UsageError(f"{name} ({' + '.join(paths)}) is no linear layer of torch. {WHOLE}")
            size = group_size(held[0].layout, ins)
            every = slice(None, None, size)
            layer = Linear(
                held[0].layout.bits,
                np.ascontiguousarray(codes.T),
                np.ascontiguousarray(scale[:, every].T),
                np.ascontiguousarray(zero[:, every].T),
                np.arange(ins) // size,
            )
            yield name.removesuffix(".weight"), layer


def group_size(layout: Uniform, ins: int) -> int:
    """Inputs that share a scale."""
    return layout.group if layout.group > 0 else ins


def _codes(path: str, leaf: Stored | None) -> QTensor:
    """A kernel that can be packed.

    Raises:
      UsageError: naming what keeps it from being so.
    """
    if leaf is None:
        raise UsageError(f"{path} is no codes, and stands in one matrix with others that are. {WHOLE}")
    layout = leaf.layout  # type: ignore[attr-defined]
    if type(leaf) is not QTensor:
        raise UsageError(f"{path} is stored as {layout!r}, which no packed layer can be. {WHOLE}")
    if layout.inputs is not None:
        raise UsageError(f"{path} rounds what enters, too, which packed layers do not. {WHOLE}")
    if leaf.turned:
        raise UsageError(f"{path} is a table, and packed layers multiply. {WHOLE}")
    return leaf


def _parts(path: str, leaf: QTensor, index: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Codes, scales, zeros and numbers of inputs of one kernel, all in its shape."""
    one: QTensor = jax.tree.map(lambda x: x[index], leaf)
    if len(one.shape) != len(leaf.ins) + len(leaf.outs):
        raise UsageError(f"{path}: several kernels stand in one tensor there. {WHOLE}")
    rows, columns = int(np.prod(leaf.ins)), int(np.prod(leaf.outs))
    codes = codes_in(one.codes, leaf.layout.bits, rows)  # [K, N]
    groups = one.scale.shape[0]

    def spread(of_groups: Any) -> Any:
        return jnp.repeat(jnp.broadcast_to(of_groups, (groups, columns)), rows // groups, 0)  # [K, N]

    zeros = spread(jnp.asarray(one.zeros())).astype(jnp.uint8)
    inputs = jnp.broadcast_to(jnp.arange(rows)[:, None], codes.shape)
    all_four = codes, spread(one.scale), zeros, inputs
    return tuple(np.asarray(part).reshape(*leaf.ins, *leaf.outs) for part in all_four)


def layer_names(entry: Entry, stored: Mapping[str, Stored]) -> dict[str, tuple[Uniform, tuple[int, ...]]]:
    """Layout and shape `[o, i]` of the packed layers of a row, by their names; see `layers_of`."""
    paths = entry.row.our_paths
    layout = _codes(paths[0], stored.get(paths[0])).layout
    if any(len(shape) != 2 for shape in entry.shapes):
        raise UsageError(f"{' + '.join(paths)}: no linear layers of torch stand there. {WHOLE}")
    return {
        name.removesuffix(".weight"): (layout, shape)
        for index in entry.indices()
        for name, shape in zip(entry.names(index), entry.shapes, strict=True)
    }


def section(layers: Mapping[str, Uniform], rest: tuple[str, ...], form: Format) -> dict[str, Any]:
    """The `quantization_config` of a config.json.

    Args:
      layers: layouts of the packed layers by name.
      rest: names of the blocks' linear layers that are not packed.
      form: how the others are.

    Raises:
      UsageError: for several layouts in awq, which has one.
    """
    kinds = {
        name: (lay.bits, lay.group if lay.group > 0 else -1, lay.symmetric) for name, lay in layers.items()
    }
    counted = collections.Counter(kinds.values())
    (bits, group, symmetric), _ = counted.most_common(1)[0]
    said: dict[str, Any] = {"bits": bits, "group_size": group}
    if form == "awq":
        if len(counted) > 1:
            raise UsageError(f"awq has one layout, and these are {sorted(counted)}. Give --quantised=gptq.")
        said |= {"quant_method": "awq", "version": "gemm", "zero_point": True}
        return said | ({"modules_to_not_convert": list(rest)} if rest else {})
    said |= {"quant_method": "gptq", "checkpoint_format": form, "sym": symmetric, "desc_act": False}
    dynamic: dict[str, Any] = {
        f"+:^{re.escape(name)}$": {"bits": kind[0], "group_size": kind[1], "sym": kind[2]}
        for name, kind in kinds.items()
        if kind != (bits, group, symmetric)
    }
    dynamic |= {f"-:^{re.escape(name)}$": {} for name in rest}
    if rest:
        inner = {_within_block(name): None for name in layers}
        said["modules_in_block_to_quantize"] = [[name] for name in inner]
    return said | ({"dynamic": dynamic} if dynamic else {})


def _within_block(name: str) -> str:
    """What follows the number of the block."""
    return re.split(r"\.\d+\.", name, maxsplit=1)[-1]


class Packed:
    """A source that shows packed layers as weights `[o, i]`, or one of the parts that they are made of."""

    def __init__(self, source: Source, config: Mapping[str, Any]) -> None:
        """Finds the packed layers.

        Args:
          source: the files.
          config: their `quantization_config`.

        Raises:
          UsageError: for a method that is not known here.
        """
        method = config.get("quant_method", "gptq")
        form = config.get("checkpoint_format") or config.get("format") or "gptq"
        form = "awq" if method == "awq" else form
        told = config.get("version", config.get("format", "gemm"))
        if (
            method not in ("gptq", "awq")
            or form not in FORMATS
            or (method == "awq" and told.lower() != "gemm")
        ):
            raise UsageError(
                f"{source.where} is quantised as {dict(config)}: gptq, gptq_v2 and awq (gemm) are read here."
            )
        self.form: Format = form
        self.where = source.where
        self.view = "weights"
        self.symmetric = bool(config.get("sym", not config.get("zero_point", False)))
        self._source = source
        names = [name.removesuffix(".qweight") for name in source.specs if name.endswith(".qweight")]
        self.layers = {f"{name}.weight": name for name in names}
        inner = {f"{name}.{part}" for name in names for part in PARTS}
        specs = {name: spec for name, spec in source.specs.items() if name not in inner}
        self._linear: tuple[str, Linear] | None = None
        for weight, name in self.layers.items():
            missing = [part for part in PARTS[:3] if f"{name}.{part}" not in source.specs]
            if missing:
                raise UsageError(f"{self.where}: {name} has a qweight and no {' and no '.join(missing)}.")
            shapes = [tuple(source.specs[f"{name}.{part}"].shape) for part in PARTS[:3]]
            ins, outs, _ = measures(shapes[0], shapes[1], shapes[2], self.form)
            specs[weight] = Spec((outs, ins), np.dtype(np.float32))
        self.specs: Mapping[str, Spec] = specs

    def showing(self, view: str) -> "Packed":
        """The same source with `codes`, `scale` or `zero` of each weight in the place of `weights`."""
        shown = copy.copy(self)
        shown.view = view
        return shown

    def linear(self, weight: str) -> Linear:
        """The packed layer that stands for a weight; the last one is kept."""
        name = self.layers[weight]
        if self._linear is None or self._linear[0] != name:
            tensors = {}
            for part in PARTS:
                if spec := self._source.specs.get(f"{name}.{part}"):
                    tensors[part] = np.empty(spec.shape, spec.dtype)
                    self._source.read(f"{name}.{part}", tensors[part])
            self._linear = name, unpack(tensors, self.form)
        return self._linear[1]

    def read(self, name: str, out: np.ndarray) -> None:
        """Reads a tensor, or makes it."""
        if name not in self.layers:
            return self._source.read(name, out)
        layer = self.linear(name)
        shown = dict(weights=layer.weights, codes=lambda: layer.codes, scale=layer.scale, zero=layer.zero)
        out[...] = shown[self.view]().T
        return None

    def close(self) -> None:
        """Closes the files."""
        self._source.close()


def kernels_of(
    steps: Iterable[Step],
    packed: Packed,
    read: Callable[[Step, Source], Iterable[np.ndarray]],
    places: Mapping[str, Place],
) -> dict[str, QTensor]:
    """Our kernels in codes, by path.

    Args:
      steps: rows whose tensors are packed layers.
      packed: their source.
      read: our leaves of a row from a source.
      places: the kernels of the model.

    Raises:
      UsageError: where a kernel cannot hold its layers as they are.
    """
    found = {}
    for step in steps:
        layers = [packed.linear(name) for name in step.tensors()]
        layout = layout_of(step, layers, packed.symmetric)
        parts = [read(step, packed.showing(view)) for view in ("codes", "scale", "zero")]
        for path, codes, scale, zero in zip(step.entry.row.our_paths, *parts, strict=True):
            found[path] = held(layout, codes, scale, zero, places[path])
    return found


def layout_of(step: Step, layers: list[Linear], symmetric: bool) -> Uniform:
    """The layout of a row's layers.

    Args:
      step: the row.
      layers: all of its layers.
      symmetric: whether grids without other zeros than the middle are to be symmetric.

    Raises:
      UsageError: where they have several, or groups that do not follow each other.
    """
    what = " + ".join(step.entry.row.our_paths)
    sizes = {len(layer.groups) // len(layer.scales) for layer in layers}
    kinds = {(layer.bits, layer.scales.dtype.name) for layer in layers}
    if len(sizes) > 1 or len(kinds) > 1:
        raise UsageError(f"{what}: the layers of one stack have one layout, and these differ. {_IN}")
    [size], [(bits, scale)] = sizes, kinds
    if any((layer.groups != np.arange(len(layer.groups)) // size).any() for layer in layers):
        raise UsageError(f"{what}: groups that do not follow each other (desc_act) are not kept. {_IN}")
    middle = all((layer.zeros == 2 ** (bits - 1)).all() for layer in layers)
    group = 0 if all(len(layer.scales) == 1 for layer in layers) else size
    known: Any = scale
    return Uniform(bits, group, symmetric and middle, known)


_IN = "Give --quantised=whole, which reads the weights that the codes stand for."


def places_of(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Place]:
    """The kernels of a model."""
    return kernels(jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"])


def held(layout: Uniform, codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, place: Place) -> QTensor:
    """A kernel of these codes, scales and zeros, each in its shape."""
    rows = place.matrix[0]
    matrices = [flat(jnp.asarray(part), place) for part in (codes, scale, zero)]
    every = slice(None, None, layout.group or rows)
    return layout.held(
        matrices[0].astype(jnp.uint8), matrices[1][..., every, :], matrices[2][..., every, :], place
    )
