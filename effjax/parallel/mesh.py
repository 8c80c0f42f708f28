"""The device mesh, from five numbers in the config.

| axis | what is cut along it |
|---|---|
| `data` | the batch; parameters are copied |
| `fsdp` | the batch and every parameter (fully sharded data parallelism; ZeRO stage 3) |
| `tensor` | heads, hidden channels and the vocabulary (Megatron) |
| `expert` | experts of a mixture |
| `sequence` | the tokens of a sequence |
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from effjax.errors import UsageError

AXES = ("data", "fsdp", "tensor", "expert", "sequence")


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Devices along each axis; -1 for one of them means all that remain."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1
    sequence: int = 1

    def sizes(self, devices: int) -> dict[str, int]:
        """Resolves -1 against a number of devices.

        Raises:
          UsageError: where the sizes do not multiply to the number of devices.
        """
        sizes = {axis: getattr(self, axis) for axis in AXES}
        asked = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
        free = [axis for axis, size in sizes.items() if size == -1]
        if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
            raise UsageError(f"config.mesh ({asked}): sizes are positive, and at most one may be -1.")
        known = math.prod(size for size in sizes.values() if size != -1)
        if free and devices % known == 0:
            sizes[free[0]] = devices // known
        if math.prod(sizes.values()) != devices:
            raise UsageError(
                f"config.mesh ({asked}) does not multiply to the {devices} devices that are here: "
                f"set the sizes so that their product is {devices}, or one of them to -1."
            )
        return sizes


def make_mesh(shape: MeshShape, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Lays the devices out; fast axes (tensor, expert, sequence) vary last, so that they are neighbours."""
    devices = jax.devices() if devices is None else list(devices)
    sizes = shape.sizes(len(devices))
    dims = tuple(sizes.values())
    types = (AxisType.Auto,) * len(dims)
    if devices[0].platform == "cpu":
        return Mesh(np.asarray(devices).reshape(dims), tuple(sizes), axis_types=types)
    # On TPU and GPU the order follows the interconnect.
    try:
        return jax.make_mesh(dims, tuple(sizes), axis_types=types, devices=devices)
    except NotImplementedError:
        # No axis of the torus, nor several together, is as long as an axis of the mesh: they are split.
        laid_out = mesh_utils.create_device_mesh(dims, devices, allow_split_physical_axes=True)
        return Mesh(laid_out, tuple(sizes), axis_types=types)
