"""RepBN folded away: networks of SLAB without any norm, and with the same outputs.

    before a projection      (s x + t) W + b  =  x (diag(s) W) + (t W + b),   s = gamma / sigma + eta
    behind one               s (x W + b) + t  =  x (W diag(s)) + (s b + t),   t = beta - mean gamma / sigma

What reads a norm is named in `READERS`. The last norm may be folded into the classifier although a mean over
places stands between the two: it is affine too.

Source: SLAB, Guo et al. 2024, section 3.2.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.core import meta

from effjax.compress.fold import Affine, affine_before, affine_behind, batch_norm
from effjax.errors import UsageError
from effjax.layers.downsample import Merge
from effjax.layers.progressive import Progressive
from effjax.models.pyramid import Pyramid
from effjax.models.vit import ViT

# Which layers, named from beside a norm, read its output.
READERS: dict[str, tuple[str, ...]] = {
    "mixer_norm": ("mixer/query", "mixer/key", "mixer/value"),
    "ffn_norm": ("ffn/expand",),
    "norm": ("head", "classifier", "reduction"),
}
# And which, where there is none of these, writes what it reads.
WRITER = "embed/projection"

Tree = dict[str, Any]


def fold_norms(model: nn.Module, variables: Mapping[str, Any]) -> tuple[nn.Module, Tree]:
    """Returns the network without norms and its variables; its outputs in evaluation are the same.

    Windows that do not tile a map are padded with zeros behind the norm, which then are zeros before it: such
    maps come out slightly otherwise.

    Args:
      model: a ViT or a pyramid whose norms are `rep_batch` or progressive.
      variables: its parameters and batch statistics.

    Raises:
      UsageError: for another network, or one without such norms.
    """
    if not isinstance(model, ViT | Pyramid):
        raise UsageError(f"RepBN is folded in a ViT or a pyramid, not in a {type(model).__name__}.")
    held = meta.unbox(dict(variables))
    epsilons = _epsilons(model)
    if len(epsilons) != 1:
        raise UsageError(
            f"norms to fold need one epsilon, and there are {sorted(epsilons) or 'no such norms'}."
        )
    (epsilon,) = epsilons
    params = _folded(held["params"], held.get("batch_stats", {}), epsilon, "")
    return _without(model), {"params": params}


def _folds(norm: Any) -> bool:
    return norm == "rep_batch" or isinstance(norm, Progressive)


def _parts(module: nn.Module) -> dict[str, Any]:
    """Modules in its fields, alone or in tuples."""
    fields = {f.name: getattr(module, f.name) for f in dataclasses.fields(module) if f.name != "parent"}  # type: ignore[arg-type]
    return {
        name: value
        for name, value in fields.items()
        if isinstance(value, nn.Module)
        or (isinstance(value, tuple) and value and all(isinstance(item, nn.Module) for item in value))
    }


def _epsilons(module: nn.Module) -> set[float]:
    norm, found = getattr(module, "norm", None), set()
    if _folds(norm):
        found.add(norm.batch_epsilon if isinstance(norm, Progressive) else module.epsilon)  # type: ignore[attr-defined]
    for value in _parts(module).values():
        for item in value if isinstance(value, tuple) else (value,):
            found |= _epsilons(item)
    return found


def _without(module: nn.Module) -> nn.Module:
    """The definition with no norm where one is folded."""
    changes: dict[str, Any] = {
        name: tuple(map(_without, value)) if isinstance(value, tuple) else _without(value)
        for name, value in _parts(module).items()
    }
    if _folds(getattr(module, "norm", None)):
        changes["norm"] = "none"
        if isinstance(module, Merge):
            changes["use_bias"] = True
    return module.clone(**changes) if changes else module


def _folded(params: Tree, statistics: Tree, epsilon: float, name: str) -> Tree:
    """The parameters of one module and all beneath it."""
    out = {key: value for key, value in params.items() if not _is_norm(value)}
    for key, norm in params.items():
        if not _is_norm(norm):
            continue
        affine = _affine(norm, statistics[key], epsilon)
        readers = [path for path in READERS[key] if _at(out, path) is not None]
        for path in readers:
            out = _set(out, path, _mapped(affine_before, _at(out, path), affine))
        if not readers:
            out = _set(out, WRITER, _mapped(affine_behind, _at(out, WRITER), affine))
    return {
        key: _folded(value, statistics.get(key, {}), epsilon, key) if isinstance(value, dict) else value
        for key, value in out.items()
    }


def _is_norm(value: Any) -> bool:
    return isinstance(value, dict) and ("after" in value or "eta" in value)


def _affine(params: Tree, statistics: Tree, epsilon: float) -> Affine:
    """What the norm does in evaluation, with a leading axis where layers are stacked."""
    params, statistics = params.get("after", params), statistics.get("after", statistics)
    scale, shift = batch_norm(params["batch"], statistics["batch"], epsilon)
    return Affine(scale + params["eta"][..., None], shift)


def _mapped(fold: Any, layer: Tree, affine: Affine) -> Tree:
    return jax.vmap(fold)(layer, affine) if affine.scale.ndim == 2 else fold(layer, affine)


def _at(tree: Tree, path: str) -> Any:
    for key in path.split("/"):
        tree = tree.get(key)  # type: ignore[assignment]
        if tree is None:
            return None
    return tree


def _set(tree: Tree, path: str, value: Tree) -> Tree:
    key, _, rest = path.partition("/")
    return {**tree, key: _set(tree[key], rest, value) if rest else value}
