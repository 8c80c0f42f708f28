"""Parameters of ours as the tensors of another library."""

import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
from flax.core import meta

from effjax.compress.storage.trees import stored_in, whole
from effjax.errors import UsageError
from effjax.interop import quantised as codes
from effjax.interop.family import Family
from effjax.interop.load import family_of
from effjax.interop.names import Entry
from effjax.interop.packed import FORMATS, Format, pack
from effjax.interop.packed import specs as packed_specs
from effjax.interop.variables import PARAMS, flatten
from effjax.interop.weights import Spec
from effjax.interop.write import SHARD_BYTES, Progress, counted, new_folder, write_weights
from effjax.layers.stored import Stored, dtype_of


def export(
    model: nn.Module,
    params: Any,
    target: str,
    *,
    like: Collection[str] = (),
    quantised: str | None = None,
) -> dict[str, np.ndarray]:
    """Names and lays out parameters as another library has them.

    Args:
      model: the definition that the parameters belong to.
      params: its parameters, or all its variables by collection where it has others; numpy or jax arrays,
        boxed or not.
      target: `timm:<architecture>`, `transformers:<model_type>` or `diffusers:<class name>`.
      like: names that the tensors are to have, where the library spells them in several ways: those of a
        `state_dict()`, say. By default they are spelled as in its files.
      quantised: how kernels in codes are packed (see `effjax.interop.packed`), or `"whole"` for the weights
        that they stand for; None where there are none.

    Returns:
      `{their name: contiguous array}`, in the dtype of the parameters. What was loaded and not changed comes
      back bit by bit. Tensors that loading leaves out (buffers, tied copies) are not made again.

    Raises:
      UsageError: for an unknown target, a model that it has no names for, and kernels in codes that
        `quantised` says nothing of, or that it cannot hold.
    """
    resolved = _Resolved(model, params, target, like, quantised)
    return dict(resolved.tensors())


def export_to(
    folder: str | os.PathLike[str],
    model: nn.Module,
    params: Any,
    target: str,
    *,
    quantised: str | None = None,
    config: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> list[str]:
    """Writes what `export` gives as safetensors, one tensor in memory at a time.

    The folder holds `model.safetensors` (`diffusion_pytorch_model.safetensors` for diffusers), or shards and
    their index where the model is larger than `shard_bytes`; beside packed kernels also `config.json`. It
    appears whole or not at all.

    Args:
      folder: must be empty or not exist.
      model: the definition that the parameters belong to.
      params: its parameters or variables.
      target: as for `export`.
      quantised: as for `export`.
      config: the other library's configuration, to which `quantization_config` is added; None takes what the
        model itself says, where the family can say it.
      shard_bytes: size of a file that is not exceeded.
      progress: called with the bytes written so far and in all.

    Returns:
      Names of the files written.
    """
    resolved = _Resolved(model, params, target, (), quantised)
    specs = resolved.specs()
    stem = "diffusion_pytorch_model" if target.startswith("diffusers:") else "model"
    tensors = counted(specs, resolved.tensors(), progress)
    with new_folder(folder) as hidden:
        files = [Path(file).name for file in write_weights(hidden, stem, specs, tensors, shard_bytes)]
        if resolved.form is not None:
            (hidden / "config.json").write_text(json.dumps(resolved.config(config), indent=2) + "\n")
            files.append("config.json")
        return files


class _Resolved:
    """Variables and the rows that they go out by."""

    def __init__(
        self, model: nn.Module, params: Any, target: str, like: Collection[str], quantised: str | None
    ) -> None:
        variables = meta.unbox(params)
        variables = variables if PARAMS in variables else {PARAMS: variables}
        self.form: Format | None = _form(variables, quantised)
        if quantised == "whole":
            params = variables[PARAMS]
            variables = {**variables, PARAMS: whole(params, dtype_of(params))}
        if self.form is not None and not target.startswith("transformers:"):
            raise UsageError(f"{quantised} is a format of transformers, not of {target}: give 'whole'.")
        shapes, self.stored = codes.described(variables)
        self.leaves = flatten(shapes)
        self.model, self.target = model, target
        self.family: Family = family_of(target)
        try:
            _, self.entries, _ = self.family.resolved(model, self.leaves, like)
        except (UsageError, AttributeError) as error:
            # A family reads the fields of its own models, which those of another may lack.
            raise UsageError(f"{target} has no names for this {type(model).__name__}: {error}") from None

    def specs(self) -> dict[str, Spec]:
        """Shape and dtype of every tensor."""
        found: dict[str, Spec] = {}
        for entry in self.entries:
            if self.form is not None and self._packed(entry):
                scale = np.dtype(self.stored[entry.row.our_paths[0]].layout.scale)  # type: ignore[attr-defined]
                for name, (layout, (outs, ins)) in codes.layer_names(entry, self.stored).items():
                    sizes = ins, outs, ins // codes.group_size(layout, ins), layout.bits
                    found |= packed_specs(name, sizes, scale, self.form)
                continue
            dtype = np.dtype(self.leaves[entry.row.our_paths[0]].dtype)
            for index in entry.indices():
                for name, shape in zip(entry.names(index), entry.shapes, strict=True):
                    found[name] = Spec(shape, dtype)
        return found

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """All tensors by their names."""
        for entry in self.entries:
            if self.form is not None and self._packed(entry):
                for name, layer in codes.layers_of(entry, self.stored):
                    for part, array in pack(layer, self.form, name).items():
                        yield f"{name}.{part}", array
                continue
            ours = [np.asarray(self.leaves[path]) for path in entry.row.our_paths]
            for index in entry.indices():
                here: Any = (*index, ...)
                theirs = entry.to_theirs([leaf[here] for leaf in ours])
                for name, array in zip(entry.names(index), theirs, strict=True):
                    yield name, np.ascontiguousarray(array)

    def config(self, given: Mapping[str, Any] | None) -> dict[str, Any]:
        """The config.json that goes with packed kernels."""
        assert self.form is not None
        told = self.family.describe(self.model) if given is None and self.family.describe else given
        told = dict(told or {"model_type": self.target.partition(":")[2]})
        layouts: dict[str, Any] = {}
        rest: list[str] = []
        for entry in self.entries:
            if self._packed(entry):
                named = codes.layer_names(entry, self.stored)
                layouts |= {name: layout for name, (layout, _) in named.items()}
            elif entry.placeholders and all(len(shape) == 2 for shape in entry.shapes):
                names = [name for index in entry.indices() for name in entry.names(index)]
                rest += [name.removesuffix(".weight") for name in names]
        return {**told, "quantization_config": codes.section(layouts, tuple(rest), self.form)}

    def _packed(self, entry: Entry) -> bool:
        return any(path in self.stored for path in entry.row.our_paths)


def _form(variables: Mapping[str, Any], quantised: str | None) -> Format | None:
    """How kernels in codes are packed; None where there is nothing to pack.

    Raises:
      UsageError: where there is, and nothing is said of it, or the other way round.
    """
    stored: dict[str, Stored] = stored_in(variables[PARAMS])
    if quantised not in (None, "whole", *FORMATS):
        raise UsageError(f"quantised is {quantised!r}; it can be {', '.join((*FORMATS, 'whole'))}.")
    if stored and quantised is None:
        raise UsageError(
            f"{len(stored)} kernels, {next(iter(stored))} among them, are stored in codes. Give "
            f"--quantised=gptq, gptq_v2 or awq, which keep these, or --quantised=whole, which writes the "
            f"weights that they stand for."
        )
    if not stored and quantised in FORMATS:
        raise UsageError(
            f"--quantised={quantised}, and no kernel is stored in codes: run experiments.compress first."
        )
    return next((form for form in FORMATS if form == quantised), None)
