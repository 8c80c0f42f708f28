"""From logical axis names to shardings.

A model names the axes of its parameters (`embed`, `heads`, `mlp`, ...) and of its main activations
(`batch`, `length`, `features`, ...). A rules table maps each name to mesh axes; nothing else knows both
sides. XLA's partitioner then inserts the collectives.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.core import meta
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from effjax.errors import UsageError
from effjax.matching import named_leaves, path_of

AxisRules = tuple[tuple[str, str | tuple[str, ...] | None], ...]

# Names that no rule mentions are not cut.
DEFAULT_RULES: AxisRules = (
    # activations
    ("batch", ("data", "fsdp")),
    ("length", "sequence"),
    # parameters, and activations where the name is the same
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("expert", "expert"),
    ("expert_mlp", "tensor"),
)

# These axes change who computes what, so a dimension that they do not divide is refused. The others (fsdp)
# only decide where a parameter is stored, and a parameter that does not divide is kept whole.
_STRICT = {"tensor", "expert", "sequence"}


def merge_rules(overrides: Mapping[str, str | tuple[str, ...] | None]) -> AxisRules:
    """The default rules with some names mapped otherwise."""
    return tuple({**dict(DEFAULT_RULES), **overrides}.items())


@contextlib.contextmanager
def activate(mesh: Mesh, rules: AxisRules) -> Iterator[None]:
    """Makes the constraints inside models effective while a function is traced."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        yield


@contextlib.contextmanager
def without_mesh() -> Iterator[None]:
    """Inside of `activate`, undoes it."""
    with jax.set_mesh(Mesh(np.empty((), dtype=object), ())), nn.logical_axis_rules(()):
        yield


def parameter_shardings(boxed: Any, mesh: Mesh, rules: AxisRules) -> Any:
    """Shardings of freshly initialised variables, read from their axis names.

    Args:
      boxed: variables as `init` makes them (arrays or shapes), with axis names attached.
      mesh: where they will lie.
      rules: names to mesh axes.

    Returns:
      A tree of `NamedSharding` with the structure of the unboxed variables.

    Raises:
      UsageError: where a mesh axis does not divide a dimension that it must cut.
    """
    specs = nn.logical_to_mesh(nn.get_partition_spec(boxed), rules)
    shapes = named_leaves(meta.unbox(boxed))

    def sharding(key_path: tuple[Any, ...], spec: PartitionSpec) -> NamedSharding:
        path = path_of(key_path)
        return NamedSharding(mesh, _fit(path, shapes[path].shape, spec, mesh))

    return jax.tree_util.tree_map_with_path(sharding, specs, is_leaf=lambda x: isinstance(x, PartitionSpec))


def _fit(path: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh) -> PartitionSpec:
    """Drops mesh axes that do not divide a dimension, or refuses them where they must."""
    fitted: list[str | tuple[str, ...] | None] = []
    for dimension, axes in enumerate(spec):
        names = (axes,) if isinstance(axes, str) else tuple(axes or ())
        parts = int(np.prod([mesh.shape[name] for name in names]))
        if shape[dimension] % parts:
            strict = [name for name in names if name in _STRICT]
            if strict:
                raise UsageError(
                    f"parameter {path} has shape {shape}: mesh axis {strict[0]}={parts} does not divide "
                    f"dimension {dimension} ({shape[dimension]}). Choose config.mesh.{strict[0]} as a "
                    f"divisor of {shape[dimension]}."
                )
            fitted.append(None)
        else:
            fitted.append(axes)
    return PartitionSpec(*fitted)


def like_parameters(tree: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Shardings for a tree that holds copies of the parameters, such as an optimiser's state.

    A leaf whose path ends in the path of a parameter of the same shape lies as that parameter does; all
    others (counters, factored moments) are on every device.
    """
    by_path = {
        path: (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            named_leaves(params).items(), jax.tree.leaves(shardings), strict=True
        )
    }

    def sharding(key_path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        parts = path_of(key_path).split("/")
        for start in range(len(parts)):
            shape, found = by_path.get("/".join(parts[start:]), (None, None))
            if shape == leaf.shape and found is not None:
                return found
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding, tree)


def batch_sharding(mesh: Mesh, rules: AxisRules) -> NamedSharding:
    """How input batches lie: cut along their first axis."""
    return NamedSharding(mesh, PartitionSpec(dict(rules)["batch"]))


def batch_parts(mesh: Mesh, rules: AxisRules) -> int:
    """Into how many parts the mesh cuts a batch."""
    axes = dict(rules)["batch"]
    names = (axes,) if isinstance(axes, str) else tuple(axes or ())
    return int(np.prod([mesh.shape[name] for name in names]))


def readers(sharding: NamedSharding) -> dict[str, int]:
    """Which part of every batch this process reads, and into how many they are cut: arguments of a data set.

    Processes whose devices hold the same rows, because another axis of the mesh lies between them, read the
    same part.

    Raises:
      UsageError: for a mesh whose batch axes are no multiple of the processes, nor cut by them evenly.
    """
    parts = int(np.prod([sharding.mesh.shape[name] for name in _names(sharding.spec)]))
    held: dict[int, set[int]] = {}
    places: Any = sharding.devices_indices_map((parts,))
    for device, (rows,) in places.items():
        held.setdefault(device.process_index, set()).update(range(*rows.indices(parts)))
    mine = held[jax.process_index()]
    each = len(mine)
    whole = all(
        len(some) == each and min(some) % each == 0 and max(some) - min(some) == each - 1
        for some in held.values()
    )
    if not whole:
        shape = ", ".join(f"{axis}={size}" for axis, size in sharding.mesh.shape.items() if size > 1)
        raise UsageError(
            f"config.mesh ({shape}) gives the {len(held)} processes unequal parts of a batch. Let data x "
            f"fsdp be a multiple of the processes, or divide the devices of each."
        )
    return {"process_index": min(mine) // each, "process_count": parts // each}


def _names(spec: PartitionSpec) -> tuple[str, ...]:
    axes = spec[0] if spec else None
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def to_host(tree: Any) -> Any:
    """Arrays in NumPy, whole, on every process; all of them have to ask."""

    def whole(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(whole, tree)


def to_global(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """Makes global arrays out of the rows that this process has read."""
    return {
        name: jax.make_array_from_process_local_data(sharding, np.asarray(rows))
        for name, rows in batch.items()
    }
