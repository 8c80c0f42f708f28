"""Parameters: how many, how large, which of them train, and how many one token uses."""

import collections
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.core.meta import Partitioned

from effjax.matching import named_leaves
from effjax.measure.bits import bytes_of

# The logical axis along which a parameter holds several alternatives, of which a token takes some.
ALTERNATIVES = "expert"


def count_parameters(params: Any) -> int:
    """Number of parameters in a pytree of arrays or shapes; of Linen variables, in their `params`."""
    return sum(sizes_of(parameters_of(params)).values())


def count_bytes(params: Any) -> dict[str, int]:
    """Bytes of the parameters by dtype, `{"bfloat16": 1024, "int4": 512}`; two int4 take one byte."""
    held: collections.Counter[str] = collections.Counter()
    for leaf in parameters_of(params).values():
        held[leaf.dtype.name] += bytes_of(leaf)
    return dict(sorted(held.items()))


def parameters_of(params: Any) -> dict[str, Any]:
    """Leaves by path, without random keys, the boxes of logical axis names, and Linen's other collections."""
    if isinstance(params, Mapping) and "params" in params:
        params = params["params"]
    leaves = named_leaves(jax.eval_shape(lambda tree: tree, _map_boxes(lambda box: box.value, params)))
    return {
        path: leaf for path, leaf in leaves.items() if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    }


def leaf_paths(params: Any) -> list[str | None]:
    """For each leaf in tree order its path as in `parameters_of`; None where it is no parameter."""
    known = parameters_of(params)
    inside = isinstance(params, Mapping) and "params" in params
    paths: list[str | None] = []
    for path in named_leaves(_map_boxes(lambda box: box.value, params)):
        outer, _, inner = path.partition("/") if inside else ("params", "", path)
        paths.append(inner if outer == "params" and inner in known else None)
    return paths


def sizes_of(leaves: Mapping[str, Any]) -> dict[str, int]:
    """Elements by path."""
    return {path: math.prod(leaf.shape) for path, leaf in leaves.items()}


def alternatives_of(params: Any) -> frozenset[str]:
    """Paths of the parameters one of whose axes is named `expert` by its box."""
    if isinstance(params, Mapping) and "params" in params:
        params = params["params"]
    named = named_leaves(_map_boxes(lambda box: _Named(ALTERNATIVES in box.names), params))
    return frozenset(path for path, leaf in named.items() if isinstance(leaf, _Named) and leaf.expert)


def active_by_path(
    sizes: Mapping[str, int], alternatives: frozenset[str], macs: Mapping[str, int], tokens: int
) -> dict[str, int]:
    """Parameters that one token uses, on average.

    A parameter with an `expert` axis counts size * min(1, MACs / (size * tokens)): a matrix that every token
    meets does one multiply-accumulate for each element and token. One that is not multiplied but added (a
    bias of each expert) takes the share of those of which tokens use a part. What has no such axis counts
    whole, and so does a router, which every token meets.

    Args:
      sizes: elements by path.
      alternatives: the paths with an `expert` axis.
      macs: multiply-accumulates of one forward pass by path.
      tokens: how many tokens pass.
    """
    partly = [path for path in alternatives if 0 < macs.get(path, 0) < sizes[path] * tokens]
    whole = sum(sizes[path] for path in partly)
    typical = sum(macs[path] for path in partly) / (whole * tokens) if whole else 1.0
    active = dict(sizes)
    for path in alternatives:
        share = macs[path] / (sizes[path] * tokens) if macs.get(path) else typical
        active[path] = round(sizes[path] * min(1.0, share))
    return active


class _Named:
    """Stands in place of a box: whether it names the axis. No pytree, so a leaf."""

    def __init__(self, expert: bool) -> None:
        self.expert = expert


def _map_boxes(function: Any, tree: Any) -> Any:
    """The tree with every box of logical axis names replaced."""
    return jax.tree.map(
        lambda leaf: function(leaf) if isinstance(leaf, Partitioned) else leaf,
        tree,
        is_leaf=lambda leaf: isinstance(leaf, Partitioned),
    )
