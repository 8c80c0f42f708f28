"""RepBN folded away: networks of SLAB without any norm, and with the same outputs.

    before a projection      (s x + t) W + b  =  x (diag(s) W) + (t W + b),   s = gamma / sigma + eta
    behind one               s (x W + b) + t  =  x (W diag(s)) + (s b + t),   t = beta - mean gamma / sigma

What reads a norm is named in `READERS`. The last norm may be folded into the classifier although a mean over
places stands between the two: it is affine too. An embedding that was the head as well no longer is.

Source: SLAB, Guo et al. 2024, section 3.2.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

from effjax.compress.fold import Affine, affine_before, affine_behind, batch_norm
from effjax.errors import UsageError
from effjax.layers.conv import ConvNorm
from effjax.layers.downsample import Merge, Patches
from effjax.layers.progressive import Progressive
from effjax.models.blocks.metaformer import Block
from effjax.models.heads import Linear
from effjax.models.lm import LM, DecoderBlock
from effjax.models.pyramid import Pyramid
from effjax.models.vit import ViT

# Which layers, named from beside a norm, read its output: the first of these groups that is there.
READERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "mixer_norm": (
        ("mixer/query", "mixer/reduce/projection"),
        ("mixer/query", "mixer/key", "mixer/value"),
    ),
    "reduced_norm": (("key", "value"),),
    "ffn_norm": (("ffn/gate", "ffn/expand"), ("ffn/expand",)),
    "norm": (("representation",), ("head", "distillation_head"), ("head",), ("classifier",), ("reduction",)),
}
# And which, where there is none of these, writes what it reads.
WRITERS = "embed/projection", "conv"

# Nothing but these layers and means may stand between a norm and its readers.
MEANS = "mean", "token", "token_mean", "none"
PLACES: tuple[tuple[type, str, tuple[Any, ...]], ...] = (
    (Block, "order", ("pre_norm",)),
    (Block, "stream_norm", (False,)),
    (DecoderBlock, "norm_at", ("before",)),
    (DecoderBlock, "parallel", ("no", "two_norms")),
    (Patches, "norm_first", (False,)),
    (Merge, "norm_first", (True,)),
    (ViT, "pool", MEANS),
    (Linear, "pool", MEANS),
    (Linear, "hidden", (None,)),
    (Linear, "distillation", (False,)),
)

Tree = dict[str, Any]


def fold_norms(model: nn.Module, variables: Mapping[str, Any]) -> tuple[nn.Module, Tree]:
    """Returns the network without norms and its variables; its outputs in evaluation are the same.

    Windows that do not tile a map are padded with zeros behind the norm, which then are zeros before it: such
    maps come out slightly otherwise.

    Args:
      model: a ViT, a pyramid or a language model whose norms are `rep_batch` or progressive.
      variables: its parameters and batch statistics.

    Raises:
      UsageError: for another network, one without such norms, or with one that has no place to go.
    """
    if not isinstance(model, ViT | Pyramid | LM):
        raise UsageError(
            f"RepBN is folded in a ViT, a pyramid or a language model, not in a {type(model).__name__}."
        )
    held = meta.unbox(dict(variables))
    epsilons = {_epsilon(module) for module in _modules(model) if _folds(getattr(module, "norm", None))}
    if len(epsilons) != 1:
        raise UsageError(
            f"norms to fold need one epsilon, and there are {sorted(epsilons) or 'no such norms'}."
        )
    (epsilon,) = epsilons
    _check(model)
    params, statistics = held["params"], held.get("batch_stats", {})
    if isinstance(model, LM):
        params = _into_the_head(params, statistics, epsilon)
    return _without(model), {"params": _folded(params, statistics, epsilon, "")}


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


def _modules(module: nn.Module) -> Iterator[nn.Module]:
    """It and all in its fields."""
    yield module
    for value in _parts(module).values():
        for item in value if isinstance(value, tuple) else (value,):
            yield from _modules(item)


def _epsilon(module: Any) -> float:
    return module.norm.batch_epsilon if isinstance(module.norm, Progressive) else module.epsilon


def _check(model: nn.Module) -> None:
    """Refuses norms whose output goes elsewhere than to their readers."""
    for module in _modules(model):
        # The norms of a whole network are its block's.
        if not _folds(getattr(module, "norm", "rep_batch")):
            continue
        for kind, field, allowed in PLACES:
            if isinstance(module, kind) and getattr(module, field) not in allowed:
                known = " or ".join(repr(value) for value in allowed)
                raise UsageError(
                    f"RepBN is folded where {field} of a {kind.__name__} is {known}, not "
                    f"{getattr(module, field)!r}."
                )


def _without(module: nn.Module) -> nn.Module:
    """The definition with no norm where one is folded, and with the biases that take it up."""
    changes: dict[str, Any] = {
        name: tuple(map(_without, value)) if isinstance(value, tuple) else _without(value)
        for name, value in _parts(module).items()
    }
    if _folds(getattr(module, "norm", None)):
        changes["norm"] = "none"
        if isinstance(module, Merge | ConvNorm):
            changes["use_bias"] = True
        for name, bias in (("mixer", "qkv_bias"), ("ffn", "use_bias")):
            if hasattr(changes.get(name), bias):
                changes[name] = changes[name].clone(**{bias: True})
    if isinstance(module, LM):
        changes |= dict(tied=False, head_bias=True)
    return module.clone(**changes) if changes else module


def _folded(params: Tree, statistics: Tree, epsilon: float, name: str) -> Tree:
    """The parameters of one module and all beneath it."""
    out = {key: value for key, value in params.items() if not _is_norm(value)}
    for key, norm in params.items():
        if not _is_norm(norm):
            continue
        affine = _affine(norm, statistics[key], epsilon)
        readers = next((group for group in READERS.get(key, ()) if all(_at(out, p) for p in group)), ())
        writer = next((path for path in WRITERS if _at(out, path)), None)
        for path in readers:
            out = _set(out, path, _mapped(_before, _at(out, path), affine))
        if not readers:
            if key != "norm" or writer is None:
                raise UsageError(f"nothing beside the norm {name}/{key} is known to read it.")
            out = _set(out, writer, _mapped(affine_behind, _at(out, writer), affine))
        if key == "ffn_norm":
            out = _set(out, "ffn/contract", _with_bias(_at(out, "ffn/contract")))
    return {
        key: _folded(value, statistics.get(key, {}), epsilon, f"{name}/{key}")
        if isinstance(value, dict)
        else value
        for key, value in out.items()
    }


def _into_the_head(params: Tree, statistics: Tree, epsilon: float) -> Tree:
    """The last norm of a language model becomes part of its head, a table and no layer."""
    affine = _affine(params["norm"], statistics["norm"], epsilon)
    table = params["head" if "head" in params else "embedding"]  # [V, C]
    head = affine_before({"kernel": table.T}, affine)
    bias = head["bias"] + params["head_bias"] if "head_bias" in params else head["bias"]
    kept = {name: value for name, value in params.items() if name != "norm"}
    return kept | {"head": head["kernel"].T, "head_bias": bias}


def _is_norm(value: Any) -> bool:
    return isinstance(value, dict) and ("after" in value or "eta" in value)


def _affine(params: Tree, statistics: Tree, epsilon: float) -> Affine:
    """What the norm does in evaluation, with a leading axis where layers are stacked."""
    params, statistics = params.get("after", params), statistics.get("after", statistics)
    scale, shift = batch_norm(params["batch"], statistics["batch"], epsilon)
    return Affine(scale + params["eta"][..., None], shift)


def _before(layer: Tree, affine: Affine) -> Tree:
    """The layer behind the norm; one of patches reads the same channels at every place."""
    places = layer["kernel"].shape[0] // affine.scale.shape[0]
    return affine_before(layer, Affine(*(jnp.tile(vector, places) for vector in affine)))


def _with_bias(layer: Tree) -> Tree:
    """A layer of a stack with a bias, of zeros where it had none."""
    kernel = layer["kernel"]  # [L, F, C]
    return {"bias": jnp.zeros((*kernel.shape[:-2], kernel.shape[-1]), kernel.dtype), **layer}


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
