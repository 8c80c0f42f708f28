"""Compiles every kernel ahead of time for chips that are not here, and reads back what the compilers say.

    python -m pallas_kernels.aot [--kernel=NAME] [--target=v5e] [--all] [--write]

What was compiled before and has not changed is not compiled again: figures are kept in `results.json`.
Nothing is run on hardware: the figures are static. Each compile is a process of its own, as libtpu and ptxas
end the process at some mistakes. What is read, and what it is worth:

TPU (libtpu)
    cycles      libtpu's own interpretation of the scheduled instructions, with a model of copies. Of a part
                of the heads, and times the others: programs of other heads do the same. It ranks kernels;
                it has agreed with hardware to 5% for matrix products alone, and is blind to HBM's bandwidth.
                Not told where the profiler gives up, or finds more operations a second than the chip does.
    bytes       from and to HBM, by the index maps: a block moves when its index changes. Exact.
    around      what XLA does around the kernels, to turn and fill up arrays: bytes as its cost analysis has
                them, and time from those over the bandwidth. It counts on the kernels' side.
    memory      vector memory that libtpu notes for a kernel.
    time        the larger of cycles / clock and bytes / bandwidth, which is a lower bound.
    XLA         the reference: bytes as its cost analysis counts them, and time from the larger of those over
                the bandwidth and floating-point operations over the peak rate. A lower bound too.
GPU (ptxas)
    registers, spills, shared memory, whether products are serialised: exact. Occupancy follows from them.
    XLA         the temporary memory of the reference: logits that the kernel never writes.
"""

import argparse
import dataclasses
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from pallas_kernels import KERNELS, results, versions

RESULTS = Path(__file__).with_name("RESULTS.md")
SECONDS = 420
# The compilers read these when they are loaded; libtpu would look for the machine it runs on.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "XLA_FLAGS": "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false",
    "MOSAIC_GPU_DUMP_PTXAS": "1",
    "MOSAIC_GPU_DUMP_HOST_LLVM": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# What a kernel must hold. Registers are 255 at most, and a block of a Hopper GPU has 227 KiB.
MOST_SHARED = 232_448
LEAST_OCCUPANCY = 0.0625


@dataclasses.dataclass(frozen=True)
class Target:
    """A chip to compile for."""

    name: str
    implementation: str


TARGETS = (
    *(Target(name, "tpu") for name in ("v5e", "v5p", "v6e")),
    *(Target(name, "gpu") for name in ("h100", "h200")),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One kernel at one shape on one chip: what the child found, or why it found nothing."""

    kernel: str
    shape: str
    target: Target
    found: dict[str, Any]

    def faults(self) -> Iterator[str]:
        """What does not hold."""
        at = f"{self.kernel} {self.shape} {self.target.name}"
        if "failed" in self.found:
            yield f"{at}: does not compile: {self.found['failed']}"
            return
        for part in self.found["kernels"]:
            if self.target.implementation == "gpu":
                if part["spilled"]:
                    yield f"{at} {part['name']}: {part['spilled']} bytes are spilled"
                if part["serialised"]:
                    yield f"{at} {part['name']}: wgmma is serialised"
                if part["shared"] > MOST_SHARED:
                    yield f"{at} {part['name']}: {part['shared']} bytes of shared memory"
                if part["occupancy"] < LEAST_OCCUPANCY:
                    yield f"{at} {part['name']}: occupancy {part['occupancy']:.1%}"
        if self.target.implementation == "tpu" and not better(self.found):
            yield f"{at}: neither fewer bytes nor less time than XLA's own code"


def better(found: dict[str, Any]) -> bool:
    """Whether a TPU kernel needs fewer bytes, or less time by the estimates, than XLA's code."""
    parts, xla, around = found["kernels"], found["xla"], found["around"]
    known = all(part["cycles"] is not None for part in parts)
    time = sum(part["microseconds"] for part in parts) + 1e6 * around / found["bandwidth"] if known else None
    quicker = time is not None and time < xla["microseconds"]
    return quicker or sum(part["bytes"] for part in parts) + around < xla["bytes"]


def compiled(place: results.Place) -> Row:
    """Compiles in processes of their own: a TPU's kernels in one, the cycles of each in another."""
    kernel, shape, name = place
    target = next(target for target in TARGETS if target.name == name)
    found = _child(kernel, shape, target, target.implementation)
    if target.implementation == "tpu" and "failed" not in found:
        for part in found["kernels"]:
            # The profiler knows not every instruction, and ends its process at one that it does not.
            told = _child(kernel, shape, target, "cycles", of=part["name"], called=part["called"])
            part["cycles"] = told.get("cycles") or None  # none at all are no figure either
            moving = part["bytes"] / found["bandwidth"]
            computing = None if part["cycles"] is None else part["cycles"] / found["clock"]
            if computing is not None and part["flops"] / computing > found["rate"]:
                # Faster than the chip is: the profiler has left something out.
                part["cycles"] = computing = None
            part["microseconds"] = 1e6 * max(moving, computing or 0)
            part["bound"] = "HBM" if computing is None or moving > computing else "cycles"
        xla = found["xla"]
        xla["microseconds"] = 1e6 * max(xla["bytes"] / found["bandwidth"], xla["flops"] / found["rate"])
    return Row(kernel, shape, target, found)


def _child(kernel: str, shape: str, target: Target, figure: str, **of: str) -> dict[str, Any]:
    task = json.dumps(dict(kernel=kernel, shape=shape, target=target.name, figure=figure, **of))
    command = [sys.executable, "-m", "pallas_kernels.aot_child", task]
    root = str(Path(__file__).resolve().parents[1])
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": paths}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return dict(failed=f"takes more than {SECONDS} s")
    said = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    if done.returncode or not said:
        return dict(failed=_why(done))
    return json.loads(said[-1].removeprefix("FOUND "))


def _why(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in done.stderr.splitlines() if "rror" in line or "failed" in line]
    return (lines or done.stderr.splitlines() or [f"exit {done.returncode}"])[-1].strip()[:200]


def tables(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines: list[str] = []
    for_tpu = [row for row in rows if row.target.implementation == "tpu"]
    for_gpu = [row for row in rows if row.target.implementation == "gpu"]
    if for_tpu:
        lines += [
            "| kernel | shape | chip | cycles | MB | vector memory, MiB | µs at least |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in for_tpu:
            lines += _tpu_lines(row)
    if for_gpu:
        lines += [
            "",
            "| kernel | shape | chip | registers | spilled | shared, KiB | blocks | occupancy | wgmma |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for row in for_gpu:
            lines += _gpu_lines(row)
    return "\n".join(lines) + "\n"


def _tpu_lines(row: Row) -> Iterator[str]:
    start = f"{row.shape} | {row.target.name}"
    if "failed" in row.found:
        yield f"| {row.kernel} | {start} | {row.found['failed']} | | | |"
        return
    for part in row.found["kernels"]:
        cycles = "not told" if part["cycles"] is None else f"{part['cycles']:,}"
        time = f"{part['microseconds']:.0f} ({part['bound']})"
        yield (
            f"| `{part['name']}` | {start} | {cycles} | {part['bytes'] / 1e6:.1f} |"
            f" {part['vector_memory'] / 2**20:.1f} | {time} |"
        )
    xla, around = row.found["xla"], row.found["around"]
    time = f"{1e6 * around / row.found['bandwidth']:.0f} (HBM)"
    yield f"| around these kernels | {start} | | {around / 1e6:.1f} | | {time} |"
    time = f"{xla['microseconds']:.0f}"
    yield f"| XLA in their place | {start} | | {xla['bytes'] / 1e6:.1f} | | {time} |"


def _gpu_lines(row: Row) -> Iterator[str]:
    start = f"{row.shape} | {row.target.name}"
    if "failed" in row.found:
        yield f"| {row.kernel} | {start} | {row.found['failed']} | | | | | |"
        return
    for part in row.found["kernels"]:
        wgmma = "serialised" if part["serialised"] else "ok"
        yield (
            f"| `{part['name']}` | {start} | {part['registers']} | {part['spilled']} |"
            f" {part['shared'] / 1024:.0f} | {part['blocks']} | {part['occupancy']:.1%} | {wgmma} |"
        )
    yield f"| XLA: {row.found['xla']['temporary'] / 1e6:,.0f} MB of temporaries | {start} | | | | | | |"


def main() -> int:
    """Prints the tables and what does not hold; exit code 1 where something does not."""
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.aot", description="static figures of kernels"
    )
    parser.add_argument("--kernel", choices=KERNELS, action="append", help="one kernel; repeat for more")
    parser.add_argument("--target", choices=[target.name for target in TARGETS], action="append")
    parser.add_argument("--all", action="store_true", help="compiles what is known too")
    parser.add_argument("--jobs", type=int, default=2, help="compiles at a time, of 3 GB each")
    parser.add_argument("--write", action="store_true", help=f"keeps the figures and writes {RESULTS.name}")
    arguments = parser.parse_args()
    entries = results.read()
    wanted = [
        place
        for place in places()
        if place[0] in (arguments.kernel or KERNELS) and place[2] in (arguments.target or [place[2]])
    ]
    missing = [place for place in wanted if arguments.all or not known(entries, place)]
    print(
        f"{len(wanted) - len(missing)} of {len(wanted)} are known, {len(missing)} are compiled.", flush=True
    )
    with ThreadPoolExecutor(arguments.jobs) as jobs:
        for place, row in zip(missing, jobs.map(compiled, missing), strict=True):
            print(f"{' '.join(place)}: {row.found.get('failed', 'compiled')}", flush=True)
            entries[place] = dict(digest=results.digest(place[0]), found=row.found)
            if arguments.write:
                results.kept(entries, place, row.found)
    rows = [row_of(entries, place) for place in wanted]
    faults = [fault for row in rows for fault in row.faults()]
    print(tables(rows))
    print("\n".join(faults) or "Everything holds.")
    if arguments.write:
        RESULTS.write_text(_page(entries))
    return 1 if faults else 0


def places() -> list[results.Place]:
    """Every kernel, at every shape that it is measured at, on every chip that it has code for."""
    found = []
    for kernel in KERNELS:
        op = importlib.import_module(f"pallas_kernels.{kernel}").OP
        for shape in importlib.import_module(f"pallas_kernels.{kernel}.shapes").SHAPES:
            own = [target for target in TARGETS if getattr(op, target.implementation) is not None]
            found += [(kernel, shape.name, target.name) for target in own]
    return found


def known(entries: Mapping[results.Place, dict[str, Any]], place: results.Place) -> bool:
    """Whether figures are of the kernel as it is, by the compilers that are installed."""
    return place in entries and entries[place]["digest"] == results.digest(place[0])


def row_of(entries: Mapping[results.Place, dict[str, Any]], place: results.Place) -> Row:
    """What was found of a place."""
    kernel, shape, name = place
    target = next(target for target in TARGETS if target.name == name)
    return Row(kernel, shape, target, entries[place]["found"])


def _page(entries: Mapping[results.Place, dict[str, Any]]) -> str:
    tools = ", ".join(f"{name} {version}" for name, version in versions.compilers().items())
    rows = [row_of(entries, place) for place in places() if known(entries, place)]
    faults = [fault for row in rows for fault in row.faults()]
    old = [place for place in places() if not known(entries, place)]
    held = "\n".join(f"- {fault}" for fault in faults) or "Everything holds."
    missing = "\n".join(f"- {' '.join(place)}" for place in old) or "Nothing."
    return f"""# What compilers say of the kernels

Written by `python -m pallas_kernels.aot --write`. **Static figures: nothing here was run on hardware.**
jax {jax.__version__}, {tools}.
What each figure is, and what it is worth, stands in `pallas_kernels/aot.py`.
Cycles that are not told: libtpu's profiler does not know an instruction of that kernel and gives up, or its
figure is of more operations a second than the chip does.

{tables(rows)}
## What must hold

No spills and no serialised `wgmma`; on TPUs fewer bytes, or less time, than XLA's own code.

{held}

## Not compiled since it changed

{missing}
"""


if __name__ == "__main__":
    sys.exit(main())
