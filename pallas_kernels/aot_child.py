"""The process that compiles a kernel for a chip: started by `pallas_kernels.aot`, prints a line of JSON."""

import contextlib
import functools
import importlib
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import lax

from pallas_kernels import grids
from pallas_kernels.shape import Shape

# The smallest topologies that libtpu has, and the clock: peak rate over operations a cycle.
TOPOLOGIES = {"v5e": ("v5e:2x2", 1.5e9), "v5p": ("v5p:2x2x1", 1.75e9), "v6e": ("v6e:2x2", 1.75e9)}
# Those that share the parallel sides of a grid.
CORES = {"v5e": 1, "v5p": 2, "v6e": 1}
# Name and bandwidth; both are compiled for compute capability 9.0a.
GPUS = {"h100": ("NVIDIA H100 80GB HBM3", 3_350_000_000_000), "h200": ("NVIDIA H200", 4_800_000_000_000)}
REGISTERS, SHARED, WARPS, BLOCKS = 65_536, 233_472, 64, 32


def main() -> None:
    """Reads the task, compiles, prints what was found."""
    task = json.loads(sys.argv[1])
    package = importlib.import_module(f"pallas_kernels.{task['kernel']}")
    shapes = importlib.import_module(f"pallas_kernels.{task['kernel']}.shapes").SHAPES
    shape = next(shape for shape in shapes if shape.name == task["shape"])
    function, figure = getattr(package, task["kernel"]), task["figure"]
    if figure == "cycles":
        found = cycles_on_tpu(function, shape, task["target"], task["of"], task["called"])
    else:
        found = (on_tpu if figure == "tpu" else on_gpu)(function, shape, task["target"])
    print("FOUND " + json.dumps(found))


def call(
    function: Callable[..., Any], shape: Shape, arrays: tuple[Any, ...], implementation: str
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """What is compiled, the function and where it is trained its cotangents; and the arguments of that."""

    def run(*given: Any) -> Any:
        return function(*given, **shape.options, implementation=implementation)

    def both(cotangent: Any, *given: Any) -> Any:
        y, pullback = jax.vjp(run, *given)
        return y, [one for one in pullback(cotangent) if one.dtype != jax.dtypes.float0]

    return (both, (jax.eval_shape(run, *arrays), *arrays)) if shape.trained else (run, arrays)


def compiled(function: Callable[..., Any], arguments: tuple[Any, ...], device: Any, platform: str) -> Any:
    """An executable for one device that need not be here."""
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array([device]), ("device",), axis_types=(AxisType.Auto,))
    there = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        traced = jax.jit(function, in_shardings=there, out_shardings=there).trace(*arguments)
        return traced.lower(lowering_platforms=(platform,)).compile()


def on_tpu(function: Callable[..., Any], shape: Shape, target: str) -> dict[str, Any]:
    """Bytes and vector memory of the kernels, bytes and operations of XLA's code, bandwidth and rate."""
    from jax.experimental.pallas import tpu as pltpu
    from jax.sharding import Mesh

    device = _tpu(target)
    run, arguments = call(function, shape, shape.arrays, "tpu")
    executable = compiled(run, arguments, device, "tpu")
    text = executable.as_text()
    equations = list(grids.pallas_calls(jax.make_jaxpr(run)(*arguments).jaxpr, arguments))
    # To the compiler's count a kernel adds what it declares; the rest is done to the arrays around it.
    declared = sum(equation.params["cost_estimate"].bytes_accessed for equation, _ in equations)
    around = executable.cost_analysis()["bytes accessed"] - declared
    kernels = [
        dict(
            name=equation.params["name"],
            bytes=grids.traffic(equation, operands),
            flops=equation.params["cost_estimate"].flops,
            vector_memory=_vector_memory(text, equation.params["name"]),
            called=_line_of(text, equation.params["name"]).partition(" = ")[0].strip().removeprefix("%"),
        )
        for equation, operands in equations
    ]
    reference, arguments = call(function, shape, shape.arrays, "reference")
    with _unrolled():
        executable = compiled(reference, arguments, device, "tpu")
    costs = executable.cost_analysis()
    with jax.set_mesh(Mesh(np.array([device]), ("device",))):
        chip = pltpu.get_tpu_info()
    return dict(
        kernels=kernels,
        around=around,
        xla=dict(
            bytes=costs["bytes accessed"],
            flops=costs["flops"],
            temporary=executable.memory_analysis().temp_size_in_bytes,
        ),
        clock=TOPOLOGIES[target][1],
        bandwidth=chip.mem_bw_bytes_per_second * chip.num_cores,
        rate=chip.bf16_ops_per_second * chip.num_cores,
    )


@contextlib.contextmanager
def _unrolled() -> Iterator[None]:
    """Writes loops of references out: what is inside of one XLA's cost analysis counts once."""
    scan = lax.scan
    lax.scan = functools.partial(scan, unroll=True)
    try:
        yield
    finally:
        lax.scan = scan


def cycles_on_tpu(
    function: Callable[..., Any], shape: Shape, target: str, name: str, called: str
) -> dict[str, Any]:
    """Cycles of one kernel by libtpu's static profiler: of some parts and of more, and so of all.

    Two cores that share a grid take a part each, so that there are as many more parts as there are cores.
    """
    cores = CORES[target]
    some: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        # libtpu reads its flags when it is loaded. The profiler aborts at much that is around a kernel, so it
        # is told the kernel's name: as it is, and as differentiation writes it.
        written = (name, f"jvp_{name}_", f"transpose_jvp_{name}__")
        only = ";".join(f"{form}{end}=true" for form in written for end in ("", ".1", ".2", ".3"))
        only += f";{called}=true"
        flags = f"--xla_jf_dump_static_llo_profile_to={folder} --xla_jf_dump_only_matching_hlo=false;{only}"
        os.environ["LIBTPU_INIT_ARGS"] = flags
        device = _tpu(target)
        for parts in (cores, 2 * cores):
            compiled(*call(function, shape, shape.part(parts), "tpu"), device, "tpu")
            for file in Path(folder).iterdir():
                some += [int(number) for number in re.findall(r"estimated_cycles: (\d+)", file.read_text())]
                file.unlink()
    if len(some) != 2:
        raise RuntimeError(f"the profiler wrote {len(some)} figures")
    return dict(cycles=some[0] + (shape.parts - cores) * (some[1] - some[0]) // cores)


def _tpu(target: str) -> Any:
    from jax.experimental import topologies

    return topologies.get_topology_desc(TOPOLOGIES[target][0], "tpu").devices[0]


def _vector_memory(text: str, name: str) -> int:
    """Bytes of vector memory of one kernel, in the text of the compiled program."""
    place = r'_memory_configs":\[\{"memory_space":"1","offset":"(\d+)","size":"(\d+)"'
    line = _line_of(text, name)
    used, given = re.search('"used_scoped' + place, line), re.search('"scoped' + place, line)
    # Before what is given to the kernel XLA may keep arrays there, which count in what is used.
    return int(used.group(2)) - (int(given.group(1)) if given else 0) if used else 0


def _line_of(text: str, name: str) -> str:
    """The call of a kernel, which may be named for its only result too."""
    for line in text.splitlines():
        called = re.search(rf"%?(\w+_)?{name}_*(\.\d+)*(\.\w+)? = ", line)
        if called and 'custom_call_target="tpu_custom_call"' in line:
            return line
    return ""


def on_gpu(function: Callable[..., Any], shape: Shape, target: str) -> dict[str, Any]:
    """What ptxas says of the kernels, and the memory of XLA's code.

    The dumps of the kernels go to the standard output of this process, from the compiler: they are caught
    there.
    """
    from jax.experimental import topologies

    name, bandwidth = GPUS[target]
    device = topologies.get_topology_desc(
        "", "cuda", topology="1x1x1", target_config=_target_config(name, bandwidth)
    ).devices[0]
    with tempfile.TemporaryFile() as file:
        sys.stdout.flush()
        kept = os.dup(1), os.dup(2)
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        try:
            compiled(*call(function, shape, shape.arrays, "gpu"), device, "cuda")
        finally:
            sys.stdout.flush()
            os.dup2(kept[0], 1), os.dup2(kept[1], 2)
        file.seek(0)
        said = file.read().decode(errors="replace")
    reference = compiled(*call(function, shape, shape.arrays, "reference"), device, "cuda")
    return dict(kernels=ptxas(said), xla=dict(temporary=reference.memory_analysis().temp_size_in_bytes))


def ptxas(said: str) -> list[dict[str, Any]]:
    """Reads the compiler's report of each kernel, and the launch that follows it."""
    kernels = []
    for part in re.split(r"Compiling entry function '", said)[1:]:
        launch = re.search(
            r"call void @mosaic_gpu_(?:launch_kernel|build_kernel_spec)\(ptr [^,]*, ([^)]*)\)", part
        )
        sizes = [int(size) for size in re.findall(r"i32 (\d+)", launch.group(1))] if launch else [0] * 10
        threads, shared = math.prod(sizes[6:9]), sizes[9]
        registers = _number(r"Used (\d+) registers", part)
        blocks = _blocks(registers, threads, shared)
        kernels.append(
            dict(
                name=part.split("'")[0].removesuffix("_mosaic_gpu_kernel"),
                registers=registers,
                spilled=_number(r"(\d+) bytes spill stores", part),
                serialised="serialized" in part,
                shared=shared,
                threads=threads,
                blocks=blocks,
                occupancy=blocks * -(-threads // 32) / WARPS,
            )
        )
    return kernels


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else 0


def _blocks(registers: int, threads: int, shared: int) -> int:
    """Blocks of a Hopper multiprocessor; registers come in units of 256 a warp, a block takes 1 KiB more."""
    warps = max(1, -(-threads // 32))
    by_registers = REGISTERS // (-(-max(registers, 1) * 32 // 256) * 256 * warps)
    return min(by_registers, SHARED // (shared + 1024), WARPS // warps, BLOCKS)


def _target_config(name: str, bandwidth: int) -> str:
    """XLA's description of a Hopper GPU, as the CUDA driver answers."""
    return f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
          shared_memory_per_block: 49152 shared_memory_per_core: {SHARED}
          shared_memory_per_block_optin: 232448
          registers_per_core_limit: {REGISTERS} registers_per_block_limit: {REGISTERS}
          core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          memory_bandwidth: {bandwidth} l2_cache_size: 52428800 device_memory_size: 85899345920
          cuda_compute_capability {{ major: 9 minor: 0 }}
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 }}
        runtime_version {{ major: 13 minor: 0 }}
        device_description_str: "{name}"
    """


if __name__ == "__main__":
    main()
