"""Stored weights in a tree of parameters."""

import math
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.core import meta
from flax.traverse_util import unflatten_dict

from effjax.errors import UsageError, did_you_mean
from effjax.layers.stored import RANGES, Kernel, Place, Stored, kernels
from effjax.matching import Rules, explain, match, path_of


def replaced(params: Any, made: Mapping[str, Any]) -> Any:
    """The same tree with other leaves at some paths.

    Args:
      params: boxed or not; what is stored otherwise counts as one leaf.
      made: what stands at a path then.
    """

    def leaf(key_path: tuple[Any, ...], old: Any) -> Any:
        return made.get(path_of(key_path), old)

    return jax.tree_util.tree_map_with_path(leaf, params, is_leaf=_one)


def leaves_of(params: Any) -> dict[str, Any]:
    """What stands in a tree, by path; what is stored otherwise counts as one leaf."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=_one)
    return {path_of(key_path): leaf for key_path, leaf in leaves}


def stored_in(params: Any) -> dict[str, Stored]:
    """What is stored otherwise, by path."""
    return {path: leaf for path, leaf in leaves_of(params).items() if isinstance(leaf, Stored)}


def whole(params: Any, dtype: Any) -> Any:
    """The tree with every kernel as the array that it stands for."""
    return replaced(params, {path: leaf.whole(dtype) for path, leaf in stored_in(params).items()})


def boxed_like(boxed: Any, layouts: Mapping[str, Any]) -> Any:
    """Freshly initialised parameters, boxed, stored in these layouts.

    Args:
      boxed: parameters in boxes with the names of their axes.
      layouts: a layout for a path, or for all kernels whose paths match a regexp.

    Raises:
      UsageError: for a path that is no kernel.
    """
    places = kernels(boxed)
    for path in layouts:
        if path not in places and not any(re.fullmatch(path, place) for place in places):
            raise UsageError(
                f"config.storage: {path!r} is no kernel of the model. {did_you_mean(path, places)}"
            )
    layouts = choose(list(layouts.items()), places, "config.storage")
    made = {}
    leaves, _ = jax.tree_util.tree_flatten_with_path(boxed, is_leaf=_one)
    for key_path, box in leaves:
        path = path_of(key_path)
        if path in layouts:
            layout, place = layouts[path], places[path]
            stored = layout.store(box.value, place)
            made[path] = jax.tree.map(nn.LogicallyPartitioned, stored, layout.names(place))
    return replaced(boxed, made)


def with_beside(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The same variables with what stored kernels keep in collections beside the parameters, at its start.

    Args:
      variables: by collection, boxed or not.
    """
    kept: dict[tuple[str, ...], Any] = {}
    for path, leaf in stored_in(variables["params"]).items():
        beside = meta.unbox(leaf).beside()
        if beside:
            kept[tuple(path.split("/"))] = beside
    return {**variables, RANGES: unflatten_dict(kept)} if kept else dict(variables)


def choose(rules: Rules, places: Mapping[str, Place], where: str = "rules") -> dict[str, Any]:
    """What the rules say of every kernel; those that no rule matches, or one says None of, are left out.

    Raises:
      UsageError: for a rule that matches no kernel.
    """
    tree = dict.fromkeys(places, 0)
    match(rules, tree, default=None, where=where)
    found = explain(rules, tree, default=None, where=where)
    return {path: value for path, value in found.items() if value is not None}


def weights_in(params: Any) -> int:
    """How many weights a tree stands for, however they are stored."""
    leaves = jax.tree.leaves(meta.unbox(params), is_leaf=lambda leaf: isinstance(leaf, Stored))
    return sum(math.prod(leaf.shape) for leaf in leaves)


def held_bytes(params: Any) -> int:
    """Bytes of all arrays or shapes, as they lie in memory."""
    leaves = jax.tree.leaves(meta.unbox(params))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves if hasattr(leaf, "dtype"))


def _one(leaf: Any) -> bool:
    return isinstance(leaf, Kernel | Stored | meta.AxisMetadata)
