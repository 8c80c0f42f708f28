"""Functions that no compiler cuts, run on each device's own rows and heads.

A kernel is a black box to XLA's partitioner, so the cut is made here: named axes go to the mesh axes that the
rules say, and each device runs the function on its part. Everything else is whole on every device.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec

Names = tuple[str | None, ...]


def on_each_device(
    function: Callable[..., Any], inputs: tuple[Names, ...], *outputs: Names
) -> Callable[..., Any]:
    """Cuts a function's arrays along named axes, of which it computes each part by itself.

    Args:
      function: of arrays; None may stand for one.
      inputs: names of the axes of each array, None for an axis that is not cut.
      outputs: of the result, or of each of several results.

    Returns:
      The function itself where there is no mesh of several devices, or where its axes do not divide an array.
    """

    def run(*arrays: Any) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1 or mesh.manual_axes:
            return function(*arrays)
        present = [(array, names) for array, names in zip(arrays, inputs, strict=True) if array is not None]
        cuts = {
            name: mesh_axes((name,), mesh)[0]
            for names in (*inputs, *outputs)
            for name in names
            if name is not None
        }
        for array, names in present:
            for side, name in zip(array.shape, names, strict=True):
                if name is not None and side % math.prod(mesh.shape[axis] for axis in cuts[name]):
                    return function(*arrays)

        def spec(names: Names) -> PartitionSpec:
            return PartitionSpec(*(None if name is None else cuts[name] or None for name in names))

        def given(*some: Any) -> Any:
            left = iter(some)
            return function(*(None if array is None else next(left) for array in arrays))

        parts = jax.shard_map(
            given,
            mesh=mesh,
            in_specs=tuple(spec(names) for _, names in present),
            out_specs=spec(outputs[0]) if len(outputs) == 1 else tuple(map(spec, outputs)),
            check_vma=False,
        )
        return parts(*(array for array, _ in present))

    return run


def mesh_axes(names: Names, mesh: Any) -> tuple[tuple[str, ...], ...]:
    """The axes of a mesh that each name of one array goes to, by the rules that are active."""
    found = nn.logical_to_mesh_axes(names) or (None,) * len(names)
    several = ((axes,) if isinstance(axes, str) else axes or () for axes in found)
    return tuple(tuple(axis for axis in axes if axis in mesh.axis_names) for axes in several)
