"""Rooflines: the least time that work can take on a chip, and which of compute, memory and network sets it.

A chip does `peak` FLOP/s and moves `bandwidth` bytes/s. Work of F FLOP that must move M bytes takes at least
max(F / peak, M / bandwidth), however well the two overlap. Its arithmetic intensity I = F / M decides which:
above the ridge, peak / bandwidth, the compute bounds it, below it the memory. In FLOP/s the roof is
min(peak, I bandwidth) (Williams, Waterman and Patterson 2009, "Roofline: an insightful visual performance
model for multicore architectures").

All of it is arithmetic on figures given: nothing runs, no device is touched. Floors hold for what they count:

  - FLOPs of matrix products only. Elementwise work, exponentials, sorting come on top of a floor.
  - Products as written. Winograd and FFT convolutions do fewer multiplications than they replace, so a
    convolution can beat its compute floor where a library chooses them (cuDNN does, for small kernels).
  - Operands in the chip's memory. What the last call left in a GPU's cache comes faster: measure with several
    input sets that together outgrow it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from effjax.errors import UsageError, did_you_mean
from effjax.measure.chips import Chip

Number = int | float


@dataclasses.dataclass(frozen=True)
class Floor:
    """The least seconds that a piece of work takes on one chip, if its three needs overlap perfectly."""

    compute: float
    """Seconds of arithmetic at the peak rate."""
    memory: float
    """Seconds of moving bytes to and from memory at the full bandwidth."""
    network: float
    """Seconds of moving bytes between chips."""

    @property
    def seconds(self) -> float:
        """The largest of the three."""
        return max(self.compute, self.memory, self.network)

    @property
    def bound(self) -> str:
        """What takes longest: "compute", "memory" or "network"; the first of those that tie."""
        needs = {"compute": self.compute, "memory": self.memory, "network": self.network}
        return max(needs, key=lambda need: needs[need])

    @property
    def mfu(self) -> float:
        """The highest model FLOP utilisation possible: the share of the peak rate that the bound leaves."""
        return self.compute / self.seconds if self.seconds else 0.0


@runtime_checkable
class Counted(Protocol):
    """What `floor_of` reads of an `effjax.measure.Cost`."""

    @property
    def macs(self) -> int:
        """Multiply-accumulates of matrix products."""

    @property
    def compulsory_bytes(self) -> int:
        """Bytes that any execution must move: what comes in read once, what goes out written once."""


def floor(
    flops: Mapping[str, Number] | tuple[Number, str],
    bytes_moved: Number,
    chip: Chip,
    *,
    network_seconds: Number = 0.0,
) -> Floor:
    """The floor of work on one device: max(sum_d F_d / peak_d, M / bandwidth, network).

    Args:
      flops: FLOPs by dtype of the operands, or one pair `(flops, dtype)`. Work of several dtypes runs on one
        matrix unit, one after the other. float32 on a GPU is taken at the rate of tf32 (`Chip.fastest`).
      bytes_moved: bytes to and from the chip's memory.
      chip: where it runs.
      network_seconds: time of its collectives, a sum of `collective_seconds`.

    Raises:
      UsageError: for a dtype without a rate on this chip.
    """
    if not isinstance(flops, Mapping):
        flops = {flops[1]: flops[0]}
    return Floor(
        compute=float(sum(amount / chip.fastest(dtype) for dtype, amount in flops.items())),
        memory=bytes_moved / chip.bandwidth,
        network=float(network_seconds),
    )


def floor_of(
    cost: Counted, chip: Chip, dtype: str, devices: int = 1, *, network_seconds: Number = 0.0
) -> Floor:
    """The floor of a counted function, its work and its bytes divided evenly over the devices.

    Replicated parameters are read by every device, which an even division leaves out: on several devices the
    memory's part is a floor, but a low one.

    Args:
      cost: `effjax.measure.count(...)` of the function, for all devices.
      chip: each of the devices.
      dtype: the operands of its matrix products.
      devices: how many share the work.
      network_seconds: time of its collectives.

    Raises:
      UsageError: for a dtype without a rate on this chip, or fewer than one device.
    """
    if devices < 1:
        raise UsageError(f"devices={devices}: a function runs on at least one.")
    work, moved = 2 * cost.macs / devices, cost.compulsory_bytes / devices
    return floor((work, dtype), moved, chip, network_seconds=network_seconds)


def intensity(flops: Number, bytes_moved: Number) -> float:
    """Arithmetic intensity F / M in FLOP a byte."""
    return flops / bytes_moved


def ridge(chip: Chip, dtype: str) -> float:
    """The intensity peak / bandwidth, in FLOP a byte, above which the memory no longer bounds."""
    return chip.fastest(dtype) / chip.bandwidth


def attainable(intensity: Number, chip: Chip, dtype: str) -> float:
    """The roof in FLOP/s over an intensity: min(peak, intensity x bandwidth)."""
    return float(min(chip.fastest(dtype), intensity * chip.bandwidth))


COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


def collective_seconds(kind: str, bytes: Number, group: int, chip: Chip, hosts: int = 1) -> float:
    """The least seconds that one collective takes among `group` devices.

    N is the size in bytes of one device's operand or result, whichever is larger, and n the group. What one
    device must send or receive, however clever the algorithm:

      all-gather (result N)        N (n-1)/n: all of the result but its own part comes in.
      reduce-scatter (operand N)   N (n-1)/n: its terms of every other device's part go out.
      all-to-all (operand N)       N (n-1)/n: all but the part it keeps goes out.
      collective-permute (N)       N: what it holds goes out.
      all-reduce (operand N)       where only devices add, 2 N (n-1)/n: together they must send 2 N (n-1)
                                   (Patarasuk and Yuan 2009), as a reduce-scatter and an all-gather do;
                                   where switches add (NVLink SHARP, InfiniBand SHARP), N: every element
                                   depends on what others hold, so N bytes of sums must come in. The
                                   links between TPUs do not add on their way.

    One device moves `chip.link` bytes/s over all links at once. A torus whose group lies along one axis uses
    two of its four or six links, and all-to-all is bound by the bisection: both take longer than this floor.

    Where the group spans h hosts (for GPUs the NVLink domains, for TPUs the slices), n/h devices each that
    share the host's cards of `chip.network` bytes/s a device, the same holds with hosts for devices:

      all-gather, reduce-scatter   N (h-1)/h a host
      all-reduce                   2 N (h-1)/h a host, or N where the network's switches add
      all-to-all                   N (h-1)/h a device: each sends its own
      collective-permute           N a host: at least one of its devices sends beyond it

    and a device moves at most `link + network` bytes/s, over both roads at once. The floor is the slower.

    Args:
      kind: one of `COLLECTIVES`, the names that HLO gives.
      bytes: N.
      group: n, devices that take part.
      chip: each of them.
      hosts: h, over which they are spread evenly.

    Raises:
      UsageError: for an unknown kind, or a group that does not divide over the hosts.
    """
    if kind not in COLLECTIVES:
        raise UsageError(f"{kind!r} is no collective. {did_you_mean(kind, COLLECTIVES)}")
    if group < 1 or hosts < 1 or group % hosts:
        raise UsageError(f"A group of {group} devices does not divide over {hosts} hosts.")
    if group == 1:
        return 0.0
    roads = chip.link if hosts == 1 else chip.link + chip.network
    # A network whose switches add helps the whole group only as far as the links' do.
    adds = chip.links_reduce or (hosts > 1 and chip.network_reduces)
    within = bytes * _share(kind, group, adds) / roads
    if hosts == 1:
        return within
    crossing = bytes * _share(kind, hosts, chip.network_reduces)
    senders = 1 if kind == "all-to-all" else group // hosts
    return max(within, crossing / (senders * chip.network))


def _share(kind: str, group: int, switches_add: bool) -> float:
    """What one of `group` members must send or receive, as a share of N."""
    if kind == "collective-permute" or (kind == "all-reduce" and switches_add):
        return 1.0
    return (2 if kind == "all-reduce" else 1) * (group - 1) / group
