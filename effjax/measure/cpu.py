"""The CPU in front of you as a chip: its rates measured, in seconds, so that floors hold on it too."""

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from effjax.errors import UsageError
from effjax.measure.chips import Chip

HEADROOM = 1.2
_SIZES = (256, 384, 512)  # of the matrices
_MIB = 2**20
_OPTIMISED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
_BEYOND_CACHES = 256 * _MIB  # bytes; more than the last-level cache of nearly every server


@dataclasses.dataclass(frozen=True)
class _Probe:
    """Something to time: which rate it speaks for, how much of it one run does, and the run."""

    rate: str
    amount: int
    run: Callable[[], object]


def measure_cpu(seconds: int | float = 3.0) -> Chip:
    """Measures the CPU that JAX runs on: the best rates that any program on it can reach.

    Every rate must be an upper bound, or a floor computed with it is none. What keeps it one:

      - *Other load only slows a probe*, so each rate is the maximum over many short runs that take turns for
        the whole time. The shortest last a quarter of a millisecond, less than a scheduler's time slice.
        Where other programs hold on to a core, even so no run may have all cores to itself: so matrix
        products are also counted against the processor time they take, and that rate times the cores.
      - *Arithmetic*: XLA's matrix products of several sizes on all cores. A dot is the only loop that keeps
        the fused multiply-adds of every core busy from registers, so nothing else (convolutions, small
        products, elementwise work) does more a second. A bfloat16 product may be done in float32: its rate is
        at least that of float32.
      - *Memory*: a program moves each of its distinct bytes once, from a cache if the last call left it
        there. So `bandwidth` is the caches': the larger of what XLA's own streaming programs reach
        (elementwise, sum, fill; from 1 to 16 MiB, where the cost of a call and main memory weigh least) and
        what one core streams through its own cache, times the cores, over which XLA may spread what it runs.
        Smaller working sets stream faster from the first-level cache, but a call takes microseconds, in which
        the bandwidth found here already moves more than that cache holds.
      - *Clocks vary*, and the best size may lie between those tried: rates are raised by `HEADROOM`.

    `uncached` is the rate once a working set leaves the caches, without headroom: what long streams get.
    `bandwidth` also stands for links, network and host_link: the devices of one host, and several processes
    on it, share its memory, in which they can reduce in place. `memory` is all that the machine has; a
    container may be allowed less. Probes are compiled with full optimisation, whatever `XLA_FLAGS` say.

    Args:
      seconds: how long to measure, besides the few seconds that compiling the probes takes.

    Raises:
      UsageError: if JAX has no CPU backend here, or for a time that is not positive.
    """
    if seconds <= 0:
        raise UsageError(f"seconds={seconds}: measuring takes time; 3 is good.")
    try:
        device = jax.devices("cpu")[0]
    except RuntimeError as error:
        raise UsageError(f"JAX has no CPU here; add it: JAX_PLATFORMS=...,cpu. ({error})") from error
    cores = _cores()
    dots = list(_dots(device))
    best, rounds = _measure([*dots, *_streams(device), *_one_core(cores)], 0.7 * seconds)
    for probe in dots[len(_SIZES) - 1 :: len(_SIZES)]:  # the largest of each dtype
        rate = cores * _by_processor_time(probe, max(0.15 * seconds, 0.25))
        best[probe.rate] = max(best[probe.rate], rate)
    bandwidth = HEADROOM * max(best["stream"], best["cores"])
    float32 = HEADROOM * best["float32"]
    return Chip(
        name="cpu",
        peak={"float32": float32, "bfloat16": max(float32, HEADROOM * best["bfloat16"])},
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        bandwidth=bandwidth,
        link=bandwidth,
        network=bandwidth,
        host_link=bandwidth,
        sources=f"measured on {cores} cores, the best of {rounds} rounds with {HEADROOM - 1:.0%} headroom",
        links_reduce=True,
        network_reduces=True,
        uncached=best["uncached"],
    )


def _measure(probes: list[_Probe], seconds: float) -> tuple[dict[str, float], int]:
    """The best of each rate over as many rounds as fit into the time, at least one, and their number."""
    for probe in probes:
        jax.block_until_ready(probe.run())  # compiles
    best = {probe.rate: 0.0 for probe in probes}
    rounds, end = 0, time.perf_counter() + seconds
    while not rounds or time.perf_counter() < end:
        for probe in probes:
            for _ in range(3):  # the first brings the operands back into the caches
                start = time.perf_counter()
                jax.block_until_ready(probe.run())
                best[probe.rate] = max(best[probe.rate], probe.amount / (time.perf_counter() - start))
        rounds += 1
    return best, rounds


def _by_processor_time(probe: _Probe, seconds: float) -> float:
    """The rate for each second of processor time. Systems count that in coarse steps: over many runs."""
    begun, end, runs = time.process_time(), time.perf_counter() + seconds, 0
    while (used := time.process_time() - begun) == 0 or time.perf_counter() < end:
        jax.block_until_ready(probe.run())
        runs += 1
    return runs * probe.amount / used


def _dots(device: jax.Device) -> Iterator[_Probe]:
    dot = jax.jit(jnp.dot, compiler_options=_OPTIMISED)
    for dtype in (jnp.float32, jnp.bfloat16):
        for size in _SIZES:
            square = jax.device_put(np.ones((size, size), dtype), device)
            yield _Probe(square.dtype.name, 2 * size**3, partial(dot, square, square))


def _streams(device: jax.Device) -> Iterator[_Probe]:
    negative, add, total = (
        jax.jit(function, compiler_options=_OPTIMISED) for function in (jnp.negative, jnp.add, jnp.sum)
    )
    fill = jax.jit(jnp.broadcast_to, static_argnums=1, compiler_options=_OPTIMISED)
    one = jax.device_put(np.float32(1), device)
    for size in (_MIB, 4 * _MIB, 16 * _MIB):
        x, y = (jax.device_put(np.ones(size // 4, np.float32), device) for _ in range(2))
        yield _Probe("stream", 2 * size, partial(negative, x))
        yield _Probe("stream", 3 * size, partial(add, x, y))
        yield _Probe("stream", size, partial(total, x))
        yield _Probe("stream", size, partial(fill, one, x.shape))
    long = jax.device_put(np.ones(_BEYOND_CACHES // 4, np.float32), device)
    yield _Probe("uncached", _BEYOND_CACHES, partial(total, long))


def _one_core(cores: int) -> Iterator[_Probe]:
    """NumPy adds on one core: reads two arrays and writes a third that all stay in its cache."""
    for size in (64 * 1024, 128 * 1024, 256 * 1024):
        x, y, out = (np.ones(size // 4, np.float32) for _ in range(3))
        yield _Probe("cores", cores * 10 * 3 * size, partial(_add, x, y, out))


def _add(x: np.ndarray, y: np.ndarray, out: np.ndarray) -> None:
    for _ in range(10):
        np.add(x, y, out=out)


def _cores() -> int:
    """Cores this process may run on; not every system can say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
