"""How devices are laid out as a mesh."""

import dataclasses
import inspect
import itertools

import pytest

from effjax.errors import UsageError
from effjax.parallel.mesh import MeshShape, make_mesh


@dataclasses.dataclass(frozen=True)
class Chip:
    """What is asked of a chip of a v5p torus."""

    id: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v5"
    core_on_chip: int = 0
    process_index: int = 0
    slice_index: int = 0


def torus(*sides):
    places = itertools.product(*(range(side) for side in reversed(sides)))
    return [Chip(i, place[::-1]) for i, place in enumerate(places)]


@pytest.mark.parametrize(
    "sizes", [dict(fsdp=16, tensor=8), dict(fsdp=16, tensor=2, sequence=4), dict(fsdp=64, tensor=2)]
)
def test_an_axis_need_not_be_as_long_as_one_of_the_torus(sizes):
    make = inspect.unwrap(make_mesh)  # whose types are checked: a chip is no `jax.Device`
    mesh = make(MeshShape(data=1, **sizes), torus(4, 4, 8))
    assert {axis: size for axis, size in mesh.shape.items() if size > 1} == sizes
    assert len({chip.id for chip in mesh.devices.flat}) == 128
    line = [
        chip.coords for chip in mesh.devices.reshape(-1, sizes["tensor"], sizes.get("sequence", 1))[0, :, 0]
    ]
    for one, next_ in itertools.pairwise(line):  # neighbours on the torus
        steps = [
            min((a - b) % side, (b - a) % side) for a, b, side in zip(one, next_, (4, 4, 8), strict=True)
        ]
        assert sum(steps) == 1


def test_sizes_that_are_not_there_are_named():
    with pytest.raises(UsageError, match="does not multiply to the 8 devices"):
        MeshShape(tensor=3).sizes(8)
    with pytest.raises(UsageError, match="at most one may be -1"):
        MeshShape(fsdp=-1).sizes(8)
    assert MeshShape(tensor=2).sizes(8)["data"] == 4
