"""Compiles a step for a topology and reads what the compiler says of it."""

import dataclasses
import math
import re
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from effjax.errors import RunError
from effjax.plan import hlo
from effjax.plan.collectives import located
from effjax.plan.steps import Step
from effjax.plan.topology import Topology
from effjax.train.program import Program

_UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device, as the compiler laid them out.

    Attributes:
      arguments: state and batch.
      outputs: results.
      reused: of the outputs, those that lie where donated arguments lay.
      temporaries: everything in between.
      peak: the most at any time.
    """

    arguments: int
    outputs: int
    reused: int
    temporaries: int
    peak: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program for one device of many.

    Attributes:
      memory: None where the compiler gave up because of it.
      needed: bytes, where the compiler gave up because they exceed the chip's memory.
      partitioned: cut for one device, before the optimiser fuses dots away.
      optimised: as it will run; None where the compiler gave up.
      output_shares: of each result, the part that one device holds; empty where the compiler gave up.
      seconds: tracing, lowering and compiling.
      host_bytes: the most memory that this process took.
    """

    memory: Memory | None
    needed: int | None
    partitioned: hlo.Module
    optimised: hlo.Module | None
    output_shares: tuple[float, ...]
    seconds: float
    host_bytes: int


def compile_step(step: Step, program: Program, topology: Topology) -> Compiled:
    """Compiles for the devices of the program's mesh, of which none need be here.

    Raises:
      RunError: where the compiler fails for another reason than memory, in its words.
    """
    began = time.monotonic()
    memory: Memory | None = None
    needed: int | None = None
    shares: tuple[float, ...] = ()
    with tempfile.TemporaryDirectory() as folder:
        with located():
            traced = step.trace(program)
            lowered = traced.lower(lowering_platforms=(topology.platform,))
        # The text of a TPU program cannot always be had from the executable, and never that of the program
        # before it was optimised. So the compiler writes both down.
        options = {"xla_dump_to": folder, "xla_dump_hlo_pass_re": ".*spmd-partitioning"}
        try:
            executable = lowered.compile(compiler_options=options)
            memory = _memory(executable.memory_analysis(), topology)
            shares = _shares(traced.out_info, executable.output_shardings)
        except jax.errors.JaxRuntimeError as error:
            needed = _out_of_memory(str(error))
            if needed is None:
                raise RunError(f"the compiler for {topology} refused the step: {_first(error)}") from error
        # Nothing is cut for a single device: the program as written is what it runs.
        partitioned = _read(folder, "*after_*spmd-partitioning.before_*") or _read(
            folder, "*before_optimizations.txt"
        )
        optimised = _read(folder, "*after_optimizations.txt") if memory else None
    if partitioned is None or (memory is not None and optimised is None):
        raise RunError(f"the compiler for {topology} wrote no text of the step, from which a plan is read.")
    return Compiled(
        memory=memory,
        needed=needed,
        partitioned=partitioned,
        optimised=optimised,
        output_shares=shares,
        seconds=time.monotonic() - began,
        host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def _shares(results: Any, shardings: Any) -> tuple[float, ...]:
    pairs = zip(jax.tree.leaves(results), jax.tree.leaves(shardings), strict=True)
    return tuple(share(leaf.shape, sharding) for leaf, sharding in pairs)


def share(shape: tuple[int, ...], sharding: Any) -> float:
    """The part of an array that one device holds: 1 where it is replicated."""
    return math.prod(sharding.shard_shape(shape)) / max(1, math.prod(shape))


def _memory(said: Any, topology: Topology) -> Memory:
    arguments, outputs = said.argument_size_in_bytes, said.output_size_in_bytes
    reused, temporaries = said.alias_size_in_bytes, said.temp_size_in_bytes
    # The CPU's compiler does not follow the use over time; the sum is then what it takes.
    followed = 0 if topology.platform == "cpu" else getattr(said, "peak_memory_in_bytes", 0)
    peak = followed or arguments + outputs - reused + temporaries
    return Memory(arguments, outputs, reused, temporaries, peak)


def _out_of_memory(message: str) -> int | None:
    """The bytes that a compiler says it would need, or None where it failed for another reason.

    >>> _out_of_memory("RESOURCE_EXHAUSTED: ... HLO temporaries (67.98G) exceeds available HBM (15.75G).")
    72992970178
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    sizes = re.findall(r"([\d.]+)([BKMGT])\b", message)
    return max((int(float(size) * _UNITS[unit]) for size, unit in sizes), default=0)


def _first(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _read(folder: str, pattern: str) -> hlo.Module | None:
    """The dump of the step itself: the largest, as small helpers are compiled on the way."""
    files = sorted(Path(folder).glob(pattern), key=lambda file: file.stat().st_size)
    return hlo.parse(files[-1].read_text()) if files else None
