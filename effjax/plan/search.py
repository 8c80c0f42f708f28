"""Other ways to lay a run out: meshes, rematerialisation policies, batch sizes.

What the compiler says costs half a minute each, so candidates come in an order in which the likely ones are
early, and those that cannot work are told apart before anything is compiled.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from effjax.errors import UsageError
from effjax.experiment import resolve
from effjax.layers.stack import REMAT
from effjax.measure.chips import CHIPS
from effjax.plan.sends import AXES, Step
from effjax.plan.topology import Topology


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to lay a run out.

    Attributes:
      mesh: devices along each axis of `AXES`.
      remat: a name in `effjax.layers.stack.REMAT`.
      batch_size: of the global batch.
    """

    mesh: tuple[tuple[str, int], ...]
    remat: str
    batch_size: int

    def config(self, config: Any) -> Any:
        """A copy of a config that is laid out so."""
        changed = type(config)(config.to_dict())
        changed.mesh = {**(config.mesh if "mesh" in config else {}), **dict(self.mesh)}
        changed.model.remat = self.remat
        changed.data.batch_size = self.batch_size
        return changed

    def refused(self, config: Any) -> str | None:
        """Why arithmetic alone rules this out, or None; the rest is for whoever builds it to say."""
        sizes, accumulate = dict(self.mesh), config.get("train", {}).get("accumulate", 1)
        parts = sizes["data"] * sizes["fsdp"] * accumulate
        return (
            f"a batch of {self.batch_size} does not divide into {parts}" if self.batch_size % parts else None
        )

    def __str__(self) -> str:
        mesh = " x ".join(f"{axis} {size}" for axis, size in self.mesh if size > 1) or "one device"
        return f"{mesh}, remat {self.remat}, batch {self.batch_size}"


def meshes(devices: int, per_host: int) -> Iterator[tuple[tuple[str, int], ...]]:
    """Every way to cut `devices` into data, fsdp and tensor.

    Tensor parallelism sends activations in every layer and wants the fastest links, so it stays within a host
    and within 16 devices.
    """
    sizes = [size for size in range(1, devices + 1) if devices % size == 0]
    tensors = [size for size in sizes if size <= min(16, per_host)]
    cut = [
        (devices // (fsdp * tensor), fsdp, tensor)
        for fsdp, tensor in itertools.product(sizes, tensors)
        if devices % (fsdp * tensor) == 0
    ]
    return (tuple(zip(AXES, one, strict=True)) for one in cut)


def first_round(config: Any, topology: Topology) -> list[Candidate]:
    """Meshes, with the policy and batch of the config.

    Those first that by arithmetic send least, and last those on which weights and moments alone do not fit.
    """
    fixed = math.prod(
        (config.mesh if "mesh" in config else {}).get(axis, 1) for axis in ("expert", "sequence")
    )
    if topology.devices % fixed:
        raise UsageError(
            f"config.mesh cuts experts and sequences {fixed} times, of {topology.devices} devices."
        )
    remat, batch = config.model.get("remat", "none"), config.data.batch_size
    per_host = max(1, topology.per_host // fixed)
    known = [Candidate(mesh, remat, batch) for mesh in meshes(topology.devices // fixed, per_host)]
    step = Step.of(resolve(config))
    capacity = CHIPS[topology.chip].memory if topology.chip in CHIPS else math.inf

    def key(one: Candidate) -> tuple[bool, float]:
        mesh = dict(one.mesh)
        return step.held(mesh) > capacity, step.sent(mesh)

    return sorted(known, key=key)


def second_round(best: Sequence[Candidate]) -> list[Candidate]:
    """The same meshes with other policies, then with other batches."""
    others = [dataclasses.replace(one, remat=remat) for one in best for remat in REMAT if remat != one.remat]
    batches = [
        dataclasses.replace(one, batch_size=size)
        for one in best
        for size in (2 * one.batch_size, one.batch_size // 2)
        if size
    ]
    return others + batches


def rank(found: Mapping[Candidate, Mapping[str, Any]]) -> list[Candidate]:
    """Layouts that fit before those that do not; then by the time for one unit.

    By the sum of what the floor takes the largest of: two layouts bound by the same compute differ in what
    they send, and what is sent is never hidden wholly.
    """

    def key(candidate: Candidate) -> tuple[bool, float]:
        plan = found[candidate]
        seconds = plan["floor"]["without_overlap"] / plan["units"] if plan["floor"] else math.inf
        return not plan["fits"], seconds

    return sorted(found, key=key)


def best(found: Mapping[Candidate, Mapping[str, Any]], count: int) -> list[Candidate]:
    """The first few of `rank`."""
    return rank(found)[:count]
