"""Block sizes of kernels, found by measuring or by the compilers' static figures, and kept as data.

`blocks.json` is a list of entries `{"op", "device", "jax", "shape", "blocks", "how"}`. `device` is a device
kind as jax says it, `jax` a version as `0.12`, `shape` a class of shapes that the operation names; `*` stands
for any. The most specific entry counts, device before version before shape. `how` says what it rests on.
Without an entry a kernel has its safe default.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from pallas_kernels import versions

TABLE = Path(__file__).with_name("blocks.json")
_KEYS = ("device", "jax", "shape")


@functools.cache
def table() -> list[dict[str, Any]]:
    """The entries, read when the first kernel asks."""
    return json.loads(TABLE.read_text())


def blocks(op: str, shape: str, default: Mapping[str, int], device: str | None = None) -> dict[str, int]:
    """The blocks of an operation.

    Args:
      op: its name.
      shape: class of the shape.
      default: blocks that are safe on any device; an entry may replace some of them.
      device: the kind of device, None for the one that the program is traced for as far as it is known.
    """
    wanted = {"device": device or device_kind(), "jax": versions.version(), "shape": shape}
    fitting = [
        entry
        for entry in table()
        if entry["op"] == op and all(entry[key] in ("*", wanted[key]) for key in _KEYS)
    ]
    best = max(fitting, key=lambda entry: [entry[key] != "*" for key in _KEYS], default=None)
    return {**default, **(best["blocks"] if best else {})}


def device_kind() -> str | None:
    """The kind of device that programs are traced for: the mesh's where there is one, else the default's.

    Of a mesh of devices that are not here, as in ahead-of-time compiling, it is theirs. A wrong guess costs
    time and nothing else.
    """
    mesh = jax.sharding.get_abstract_mesh()
    known = getattr(getattr(mesh, "abstract_device", None), "device_kind", None)
    if known is not None:
        return known
    return jax.devices()[0].device_kind
