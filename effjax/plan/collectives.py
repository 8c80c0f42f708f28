"""What a compiled program sends between devices: kinds, bytes, and along which axes of the mesh."""

import collections
import contextlib
import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from effjax.plan import hlo

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

# Kind, axes, devices of a group, hosts.
Key = tuple[str, tuple[str, ...], int, int]


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind along the same axes, those of all trips of the loops around them together.

    Attributes:
      kind: as XLA calls it.
      axes: of the mesh, along which the devices of a group differ.
      group: devices of a group.
      hosts: over how many hosts a group spreads.
      count: how many run in one call of the program.
      bytes: of the whole array, before it is cut or after it is gathered, summed over `count`, for one group.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    hosts: int
    count: int
    bytes: int


@contextlib.contextmanager
def located() -> Iterator[None]:
    """What is lowered in here says from which lines it comes: `collectives` tells its places apart by them.

    jax leaves them out where `JAX_TRACEBACK_IN_LOCATIONS_LIMIT` is 0.
    """
    limit: int = jax.config.jax_traceback_in_locations_limit  # type: ignore[attr-defined]
    jax.config.update("jax_traceback_in_locations_limit", limit or 10)
    try:
        yield
    finally:
        jax.config.update("jax_traceback_in_locations_limit", limit)


def collectives(
    module: hlo.Module, mesh: Mapping[str, int], per_host: int
) -> tuple[list[Collective], list[str]]:
    """Lists what one call of a program sends, most bytes first.

    Args:
      module: compiled, its collectives as they will run; lowered where it was `located`.
      mesh: sizes of the axes; devices are numbered along the last axis first.
      per_host: devices with consecutive numbers that share a host.

    Returns:
      The collectives, and those that could not be counted, in words.
    """
    counts: collections.Counter[Key] = collections.Counter()
    amounts: collections.Counter[Key] = collections.Counter()
    unknown: list[str] = []
    seen: set[tuple[str, str, str]] = set()
    for instruction, computation, times in hlo.walk(module):
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        # A compiler that overlaps a collective with other work may write it several times over, and those of
        # a shard_map share one channel: the same one comes from the same place in the program.
        channel = re.search(r"channel_id=(\d+)", instruction.attributes)
        place = re.search(r"metadata=\{[^}]*\}", instruction.attributes)
        identity = (
            kind,
            channel.group(1) if channel else instruction.name,
            place.group() if place else "",
        )
        if identity in seen:
            continue
        seen.add(identity)
        group = _group(instruction, math.prod(mesh.values()))
        if group is None:
            unknown.append(f"{instruction.name}: between which devices is written in an unknown way")
            continue
        if len(group) < 2:
            continue
        if times is None:
            unknown.append(f"{instruction.name}: in a loop whose length is not known")
            continue
        kind, whole = _whole(kind, instruction, computation, len(group))
        hosts = len({device // per_host for device in group})
        key = (kind, _axes(group, mesh), len(group), hosts)
        counts[key] += times
        amounts[key] += times * whole
    found = [Collective(*key, counts[key], amounts[key]) for key in counts]
    return sorted(found, key=lambda one: -one.bytes), unknown


def _whole(
    kind: str, instruction: hlo.Instruction, computation: Mapping[str, hlo.Instruction], group: int
) -> tuple[str, int]:
    """The kind as it will run, and the bytes of the array as a whole."""
    held = (computation[name] for name in instruction.operands if name in computation)
    operands = sum(hlo.bytes_of(operand.type) for operand in held)
    if kind == "all-gather":
        return kind, operands * group
    if kind == "all-reduce" and "all-reduce-scatter" in instruction.attributes:
        return "reduce-scatter", operands
    return kind, operands


def _group(instruction: hlo.Instruction, devices: int) -> tuple[int, ...] | None:
    """The devices of one group, all groups being alike; of a permutation, one sender and its receiver."""
    if instruction.opcode.startswith("collective-permute"):
        pairs = re.findall(r"\{(\d+),(\d+)\}", instruction.attributes.partition("source_target_pairs=")[2])
        return next(((int(a), int(b)) for a, b in pairs if a != b), ())
    text = instruction.attributes.partition("replica_groups=")[2]
    if text.startswith("{{"):  # {{0,1},{2,3}}
        return tuple(int(device) for device in text[2 : text.index("}")].split(","))
    if text == "" or text.startswith("{}"):
        return tuple(range(devices))
    if found := re.match(r"\[([\d,]+)\](<=\[[\d,]+\](?:T\([\d,]+\))?)", text):  # [2,4]<=[4,2]T(1,0)
        groups, of = found.groups()
        return tuple(_numbers(of).reshape(_integers(groups))[0].tolist())
    return _along_axes(text)  # mesh['x'=2,'y'=4] {'y'}


def _numbers(text: str) -> np.ndarray:
    """Device numbers in a given order: `<=[4,2]T(1,0)` counts along 4 x 2 and turns that round."""
    found = re.search(r"<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    assert found is not None
    sides = _integers(found.group(1))
    numbers = np.arange(math.prod(sides)).reshape(sides)
    return numbers.transpose(_integers(found.group(2))) if found.group(2) else numbers


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _along_axes(text: str) -> tuple[int, ...] | None:
    """The first group along some axes of a mesh; the middle 2 of an axis of 8 is written `'x':(2)2`."""
    found = re.match(r"mesh\[([^\]]*)\](?:, device_ids=\(([^)]*(?:\([\d,]*\))?)\))? \{([^}]*)\}", text)
    if found is None:
        return None
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found.group(1))}
    numbers = np.arange(math.prod(sizes.values()))
    if found.group(2):
        numbers = _numbers(f"<={found.group(2)}").reshape(-1)
    # Each axis is seen as before x part x after, of which the part varies within a group.
    parts = dict.fromkeys(sizes, (1, 1))
    for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", found.group(3)):
        if name not in sizes:
            return None
        parts[name] = (int(before), int(part)) if part else (1, sizes[name])
    shape: list[int] = []
    picked: list[Any] = []
    for name, (before, part) in parts.items():
        shape += [before, part, sizes[name] // (before * part)]
        picked += [0, slice(None), 0]
    return tuple(numbers.reshape(shape)[tuple(picked)].reshape(-1).tolist())


def _axes(group: Sequence[int], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes along which the devices of a group differ."""
    places = [np.unravel_index(device, tuple(mesh.values())) for device in group]
    return tuple(
        axis
        for axis, along in zip(mesh, zip(*places, strict=True), strict=True)
        if any(a != b for a, b in itertools.pairwise(along))
    )
