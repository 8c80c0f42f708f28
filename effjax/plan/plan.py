"""What a run needs and the least time its step can take, put together from the counter and the compiler."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from effjax.compress.storage.trees import held_bytes, stored_in, weights_in
from effjax.measure.bits import bytes_of
from effjax.measure.chips import CHIPS, Chip
from effjax.measure.cost import Cost, count
from effjax.measure.roofline import COLLECTIVES, Floor, collective_seconds, floor
from effjax.measure.work import Work
from effjax.parallel.sharding import activate
from effjax.plan import hlo, steps
from effjax.plan.collectives import Collective, collectives
from effjax.plan.compiled import Compiled, Memory, share
from effjax.plan.topology import CPU, Topology
from effjax.train.program import Program
from effjax.train.step import loss_and_gradient

DAY = 86_400


@dataclasses.dataclass(frozen=True)
class Plan:
    """A step on a topology: whether it compiles and fits, what it moves, and what bounds it.

    Attributes:
      topology: as on the command line.
      step: kind of step.
      mesh: devices along each axis.
      unit: what the step makes or reads.
      units: how many of these.
      steps: of the whole run, where the step is one of training.
      parameters: of the model.
      weight_bytes: of these on all devices together, each counted once, as the step is given them.
      macs: multiply-accumulates of one step on all devices as counted, recomputation included.
      model_macs: of the model alone, without recomputation and optimiser: what MFU counts.
      macs_per_device: as cut by the compiler; more than `macs / devices` where work is done twice.
      memory: of one device; None where the compiler gave up.
      needed: bytes of one device, by the compiler's own account where it gave up, else the peak.
      capacity: bytes of one device that a program may use.
      collectives: what the step sends.
      floor: the least seconds; None where the compiler gave up.
      dtype: of the matrix products.
      compile_seconds: tracing, lowering and compiling on this machine.
      compile_bytes: the most memory that took.
      chip: what one device can do.
      work: arithmetic and bytes of the step on all devices, by kind.
      products: matrix products of one device, those with the most work first.
      notes: what the figures leave out.
    """

    topology: str
    step: str
    mesh: Mapping[str, int]
    unit: str
    units: int
    steps: int | None
    parameters: int
    weight_bytes: int
    macs: int
    model_macs: int
    macs_per_device: int
    memory: Memory | None
    needed: int
    capacity: int
    collectives: Sequence[Collective]
    floor: Floor | None
    dtype: str
    chip: Chip
    work: Mapping[str, Work]
    products: Sequence[hlo.Product]
    compile_seconds: float
    compile_bytes: int
    notes: Sequence[str]

    @property
    def devices(self) -> int:
        """How many there are."""
        return math.prod(self.mesh.values())

    @property
    def peak(self) -> float:
        """FLOP/s of one device in the dtype of the products."""
        return self.chip.fastest(self.dtype)

    @property
    def fits(self) -> bool:
        """Whether a device has the memory."""
        return self.memory is not None and self.needed <= self.capacity

    @property
    def mfu(self) -> float | None:
        """The share of the chips' peak rate that the model's own work could reach at the floor."""
        if self.floor is None:
            return None
        return 2 * self.model_macs / (self.floor.seconds * self.devices * self.peak)

    @property
    def units_per_second(self) -> float | None:
        """At the floor: no run is faster."""
        return None if self.floor is None else self.units / self.floor.seconds

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `plan.json`: bytes, seconds, multiply-accumulates."""
        said = dataclasses.asdict(self)
        rate = self.units_per_second
        if self.floor is not None:
            said["floor"] = {
                **said["floor"],
                "seconds": self.floor.seconds,
                "without_overlap": self.floor.compute + self.floor.memory + self.floor.network,
                "bound": self.floor.bound,
            }
        return said | {
            "chip": dataclasses.asdict(self.chip) | {"peak": dict(self.chip.peak)},
            "peak": self.peak,
            "devices": self.devices,
            "compiles": self.memory is not None,
            "fits": self.fits,
            "mfu": self.mfu,
            "units_per_second": rate,
            "units_per_day": None if rate is None else rate * DAY,
        }


def chip_of(topology: Topology) -> Chip:
    """What one device of a topology can do; those of a CPU share it evenly.

    A CPU is measured, in a few seconds.
    """
    if topology.chip != CPU:
        return CHIPS[topology.chip]
    from effjax.measure.cpu import measure_cpu

    whole, parts = measure_cpu(), topology.devices
    return dataclasses.replace(
        whole,
        peak={dtype: rate / parts for dtype, rate in whole.peak.items()},
        memory=whole.memory // parts,
        bandwidth=whole.bandwidth / parts,
        link=whole.link / parts,
        network=whole.network / parts,
    )


def make_plan(step: steps.Step, program: Program, compiled: Compiled, topology: Topology, chip: Chip) -> Plan:
    """Puts together what was counted and what was compiled."""
    cost = _count(step, program)
    notes = list(cost.unknown)
    per_device, uncounted = _macs_per_device(cost, compiled, program.mesh.size)
    notes += uncounted
    if stored_in(program.shapes.params):
        notes.append("products with packed weights that are compiled to sums, in MACs a device")
    sent: list[Collective] = []
    if compiled.optimised is not None:
        sent, unread = collectives(compiled.optimised, dict(program.mesh.shape), topology.per_host)
        notes += unread
    dtype = program.experiment.train.precision.compute
    at_least = None
    if compiled.memory is not None:
        moved = _moved_per_device(cost, step, compiled, program.mesh.size)
        at_least = floor((2 * per_device, dtype), moved, chip, network_seconds=network_floor(sent, chip))
    model_macs = _gradient_macs(program) if step.kind == "train" else cost.macs
    return Plan(
        topology=str(topology),
        step=step.kind,
        mesh=dict(program.mesh.shape),
        unit=step.unit,
        units=step.units,
        steps=program.budget.total_steps if step.kind == "train" else None,
        parameters=weights_in(program.shapes.params),
        weight_bytes=held_bytes(_weights(step)),
        macs=cost.macs,
        model_macs=model_macs,
        macs_per_device=per_device,
        memory=compiled.memory,
        needed=compiled.memory.peak if compiled.memory else compiled.needed or 0,
        capacity=chip.memory,
        collectives=sent,
        floor=at_least,
        dtype=dtype,
        chip=chip,
        work=cost.work_by_kind,
        products=hlo.products(compiled.partitioned),
        compile_seconds=compiled.seconds,
        compile_bytes=compiled.host_bytes,
        notes=notes,
    )


def _weights(step: steps.Step) -> Any:
    """The parameters that a step is given, in a state of training or in variables."""
    held = step.arguments[0]
    return held.params if hasattr(held, "params") else held["params"]


def network_floor(sent: Sequence[Collective], chip: Chip) -> float:
    """The least seconds of all collectives; those within hosts and those between may overlap."""
    within = between = 0.0
    for one in sent:
        if one.kind in COLLECTIVES:
            seconds = collective_seconds(one.kind, one.bytes, one.group, chip, one.hosts)
            within, between = (within + seconds, between) if one.hosts == 1 else (within, between + seconds)
    return max(within, between)


def _count(step: steps.Step, program: Program) -> Cost:
    with activate(program.mesh, program.rules):
        return count(step.function, *step.arguments, parameters=None, donated=step.donated)


def _gradient_macs(program: Program) -> int:
    """Forward and backward pass of one step, with everything kept that the backward pass needs."""
    task, accumulate = program.task, program.experiment.train.accumulate
    if hasattr(task.model, "remat"):
        task = dataclasses.replace(task, model=task.model.clone(remat="none"))

    def gradient(state: Any, batch: Any) -> Any:
        return loss_and_gradient(task, state, batch, program.precision, accumulate)

    with activate(program.mesh, program.rules):
        return count(gradient, program.shapes, program.batch_shapes(), parameters=None).macs


def _macs_per_device(cost: Cost, compiled: Compiled, devices: int) -> tuple[int, list[str]]:
    """As the partitioner cut the work; kernels, which it does not look into, are taken as evenly cut."""
    written, unknown = hlo.multiply_accumulates(compiled.partitioned)
    return written + cost.macs_by_kind.get("kernel", 0) // devices, unknown


def _moved_per_device(cost: Cost, step: steps.Step, compiled: Compiled, devices: int) -> float:
    """Bytes to and from one device's memory that no schedule avoids.

    What is used as a whole is read by every device as far as it holds it; of what is used in part (the rows
    of an embedding table) each device may read an even share.
    """
    moved = float(cost.compulsory.constants)
    for leaf, read in zip(jax.tree.leaves(step.arguments), cost.compulsory.inputs, strict=True):
        whole = read >= bytes_of(leaf)
        moved += read * (share(leaf.shape, leaf.sharding) if whole else 1 / devices)
    for part, written in zip(compiled.output_shares, cost.compulsory.outputs, strict=True):
        moved += written * part
    return moved
