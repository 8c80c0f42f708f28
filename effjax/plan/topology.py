"""Chips by name: `v5p:8x8x8`, `v5e:16x16`, `h100:8`, `h200:8x4` (eight GPUs on each of four hosts), `cpu:8`.

Compiling ahead of time needs a compiler for the chip, not the chip: libtpu for TPUs, the CUDA plug-in with
its assembler for GPUs. Both read their environment once, when they are loaded, and libtpu answers some
mistakes by ending the process, so whoever opens a topology does it in a process of its own, started with
`Topology.environment()`.
"""

import dataclasses
import importlib.util
import math
import os
import re
import shutil
from collections.abc import Mapping
from typing import Any

from effjax.errors import UsageError, did_you_mean
from effjax.measure.chips import CHIPS, Chip

CPU = "cpu"
_EXAMPLES = (
    "Write a chip and its layout: v5p:8x8x8, v5e:16x16, h100:8, h200:8x4 (four hosts of eight), cpu:8."
)

# Dimensions of the torus that the chips of a slice form.
_TORUS = {"v4": 3, "v5p": 3, "v5e": 2, "v6e": 2}


# Flags of XLA that steer a CPU's compiler alone.
_OF_A_CPU = ("--xla_force_host", "--xla_cpu_", "--xla_llvm_")


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What XLA must know of a GPU to compile for it: the CUDA driver's own answers, as openxla/xla keeps them
    in xla/backends/gpu/target_config/specs.
    """

    capability: tuple[int, int]
    cores: int
    clock_ghz: float
    units_per_core: int
    shared_per_core: int
    shared_per_block: int
    l2_bytes: int
    description: str

    def target_config(self, chip: Chip) -> str:
        """The text form of XLA's GpuTargetConfigProto; memory and bandwidth are those of the chip."""
        major, minor = self.capability
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
              shared_memory_per_block: 49152 shared_memory_per_core: {self.shared_per_core}
              shared_memory_per_block_optin: {self.shared_per_block}
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              core_count: {self.cores} fpus_per_core: {self.units_per_core} clock_rate_ghz: {self.clock_ghz}
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              memory_bandwidth: {int(chip.bandwidth)} l2_cache_size: {self.l2_bytes}
              device_memory_size: {chip.memory}
              cuda_compute_capability {{ major: {major} minor: {minor} }}
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 }}
            runtime_version {{ major: 13 minor: 0 }}
            device_description_str: "{self.description}"
        """


_HOPPER = Gpu(
    capability=(9, 0),
    cores=132,
    clock_ghz=1.98,
    units_per_core=128,
    shared_per_core=233_472,
    shared_per_block=232_448,
    l2_bytes=52_428_800,
    description="NVIDIA H100 80GB HBM3",
)

GPUS: Mapping[str, Gpu] = {
    "a100": Gpu(
        capability=(8, 0),
        cores=108,
        clock_ghz=1.41,
        units_per_core=64,
        shared_per_core=167_936,
        shared_per_block=166_912,
        l2_bytes=41_943_040,
        description="NVIDIA A100-SXM4-80GB",
    ),
    "h100": _HOPPER,
    "h200": dataclasses.replace(_HOPPER, description="NVIDIA H200"),
    "b200": Gpu(
        capability=(10, 0),
        cores=148,
        clock_ghz=1.965,
        units_per_core=128,
        shared_per_core=233_472,
        shared_per_block=232_448,
        l2_bytes=132_644_864,
        description="NVIDIA B200",
    ),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Some chips of one kind and how they are connected.

    Attributes:
      chip: a name of `effjax.measure.chips.CHIPS`, or `cpu`.
      shape: sides of the torus for TPUs; GPUs a host, then hosts; devices of a CPU.
    """

    chip: str
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> "Topology":
        """Reads `chip:layout`.

        Raises:
          UsageError: for a chip that is not known, or a layout that it cannot have.
        """
        found = re.fullmatch(r"([A-Za-z0-9]+):([1-9]\d*(?:x[1-9]\d*)*)", text.strip())
        if found is None:
            raise UsageError(f"--topology={text} is no topology. {_EXAMPLES}")
        chip, shape = found.group(1).lower(), tuple(int(side) for side in found.group(2).split("x"))
        known = (*CHIPS, CPU)
        if chip not in known:
            raise UsageError(
                f"--topology={text}: {chip!r} is no chip. {did_you_mean(chip, known)} {_EXAMPLES}"
            )
        topology = cls(chip, shape)
        refused = topology._refused()
        if refused:
            raise UsageError(f"--topology={text}: {refused}. {_EXAMPLES}")
        return topology

    def _refused(self) -> str | None:
        """Why these chips cannot be connected so, or None."""
        if self.chip in _TORUS:
            sides = _TORUS[self.chip]
            if len(self.shape) != sides:
                return f"{self.chip} chips form a torus of {sides} dimensions, not {len(self.shape)}"
            if math.prod(self.shape[:2]) > 1 and any(side % 2 for side in self.shape[:2]):
                return f"a host holds 2x2 {self.chip} chips, so the first two sides must be even"
        elif self.chip == CPU and len(self.shape) != 1:
            return "devices of a CPU are just a number"
        elif self.chip in GPUS:
            if len(self.shape) > 2:
                return "GPUs are counted a host, then hosts"
            if self.shape[0] > 8:
                return f"a host holds at most 8 GPUs: {self.shape[0]} of them are 8x{-(-self.shape[0] // 8)}"
        return None

    def __str__(self) -> str:
        return f"{self.chip}:{'x'.join(map(str, self.shape))}"

    @property
    def platform(self) -> str:
        """As JAX calls it when lowering: `tpu`, `cuda` or `cpu`."""
        return "tpu" if self.chip in _TORUS else "cuda" if self.chip in GPUS else "cpu"

    @property
    def devices(self) -> int:
        """How many devices JAX will see."""
        return math.prod(self.shape)

    @property
    def per_host(self) -> int:
        """Devices that share a fast interconnect without leaving it: a GPU host, a whole TPU slice or CPU."""
        return self.shape[0] if self.chip in GPUS else self.devices

    def environment(self) -> dict[str, str]:
        """Variables for the process that will `open` this topology: silent, and no accelerator is started."""
        flags = os.environ.get("XLA_FLAGS", "")
        own = {
            "cpu": f"--xla_force_host_platform_device_count={self.devices}",
            # Tuning runs candidates on the GPU, and there is none. Without it XLA's own matrix kernels have
            # no tiles to go by and some products do not compile, while calls of cuBLAS need none.
            "cuda": "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false",
        }
        # libtpu reads these flags too, and stops at one of a CPU's that it does not know.
        foreign = ("--xla_force_host",) if self.platform == "cpu" else _OF_A_CPU
        kept = [flag for flag in flags.split() if not flag.startswith(foreign)]
        return {
            "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_COMPILATION_CACHE": "false",
            "XLA_FLAGS": " ".join([*kept, own.get(self.platform, "")]).strip(),
            "TF_CPP_MIN_LOG_LEVEL": "3",
            # libtpu looks for the machine it runs on; these answers keep it from asking and complaining.
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-16",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_LOG_DIR": "disabled",
            "TPU_STDERR_LOG_LEVEL": "3",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }

    def check_installed(self) -> None:
        """Whether the compiler for these chips is here.

        Raises:
          UsageError: naming what to install.
        """
        needed = {
            "tpu": ("tpu-aot", ("libtpu",)),
            # The assembler may be that of a CUDA that is installed beside Python.
            "cuda": (
                "cuda-aot",
                ("jax_plugins.xla_cuda13",)
                if shutil.which("ptxas")
                else ("jax_plugins.xla_cuda13", "nvidia.cu13"),
            ),
            "cpu": ("", ()),
        }
        extra, modules = needed[self.platform]
        missing = [name for name in modules if not _importable(name)]
        if missing:
            raise UsageError(
                f"planning for {self.chip} compiles for it, and {', '.join(missing)} is not installed: "
                f"pip install 'effjax[{extra}]'. --topology=cpu:{self.devices} needs nothing."
            )

    def open(self) -> list[Any]:
        """The devices to compile for, in a process that has `environment()`.

        Raises:
          UsageError: where the compiler does not know such a layout.
        """
        import jax
        from jax.experimental import topologies

        if self.platform == "cpu":
            return jax.devices("cpu")
        layout = "x".join(map(str, self.shape))
        try:
            if self.platform == "tpu":
                # One device a chip: the compiler runs the two cores of a v4 as one, as those of a v5p.
                options = {"chip_config_name": "megacore"} if self.chip == "v4" else {}
                topology = topologies.get_topology_desc(f"{self.chip}:{layout}", "tpu", **options)
            else:
                gpus, hosts = (*self.shape, 1)[:2]
                target = GPUS[self.chip].target_config(CHIPS[self.chip])
                topology = topologies.get_topology_desc(
                    "", "cuda", topology=f"1x{hosts}x{gpus}", target_config=target
                )
        except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
            raise UsageError(f"--topology={self}: {str(error).splitlines()[0]}. {_EXAMPLES}") from error
        return list(topology.devices)


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
