"""What chips can do at best: peak rates, memory, bandwidth, links, with the source of each figure.

A floor in seconds (`effjax.measure.roofline`) is only a floor if no figure here is too low. So where two
sources round one figure differently the larger stands, rates are of dense matrices at the boost clock, and
links count all at once in one direction. Nothing here is what a program will reach: 85 to 95% of the memory
bandwidth and 60 to 80% of the peak rate are good results.

Sources, as the table cites them:
  [cloud]    docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e: peak compute, HBM and ICI of each chip.
  [TpuInfo]  jax/_src/pallas/mosaic/tpu_info.py of jax 0.10.2: the peaks that JAX plans TPU kernels with.
  [book]     Austin et al., How to Scale Your Model, jax-ml.github.io/scaling-book, chapters on TPUs and GPUs.
  [aot]      Programs compiled ahead of time with libtpu 0.0.51 until it said what memory is left for them.
  [XLA]      openxla/xla, xla/backends/gpu/target_config/specs: what the CUDA driver says of each card.
  [NVIDIA]   Datasheets and architecture papers of Ampere, Hopper and Blackwell, their rates "with sparsity"
             halved; read as [Lockwood] copies them, and checked against the cores and clocks of [XLA].
  [Lockwood] glennklockwood.com/garden, on processors A100, H100, B200 and TPUv4.
  [DGX]      User guides of DGX A100, H100, H200 and B200: one network card a GPU.
"""

import dataclasses
from collections.abc import Mapping

from effjax.errors import UsageError, did_you_mean

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """The best that one chip can do, in FLOP/s, bytes and bytes/s."""

    name: str
    peak: Mapping[str, float]
    """FLOP/s of dense matrix products by operand dtype; a multiply-accumulate is two."""
    memory: int
    """Bytes a program may use: for TPUs what the compiler leaves it, for GPUs what the driver reports, of
    which JAX takes 75% unless `XLA_PYTHON_CLIENT_MEM_FRACTION` says otherwise."""
    bandwidth: float
    """Bytes/s between the memory and the chip, reads and writes together."""
    link: float
    """Bytes/s a chip can send over all its fast links (ICI, NVLink) at once; it receives as much."""
    network: float
    """Bytes/s between hosts (GPUs) or slices (TPUs), one direction: a chip's share of its host's cards."""
    host_link: float
    """Bytes/s between the chip and its host's memory (PCIe), one direction."""
    sources: str
    """Where the figures come from, in the terms of this file's docstring."""
    links_reduce: bool = False
    """Whether the switches between the fast links can add up what passes through them (NVLink SHARP)."""
    network_reduces: bool = False
    """Whether the network's switches can (InfiniBand SHARP)."""
    uncached: float | None = None
    """Bytes/s once a working set outgrows the caches, where `bandwidth` is the caches': a measured CPU."""

    def rate(self, dtype: str) -> float:
        """FLOP/s of matrix products of this very arithmetic: `chip("h100").rate("float32")` uses no tf32.

        Raises:
          UsageError: where the chip has no such rate, naming those it has.
        """
        name = _family(dtype)
        if name not in self.peak:
            held = ", ".join(sorted(self.peak))
            raise UsageError(f"{self.name} has no rate for {dtype}. It has {held}.")
        return self.peak[name]

    def fastest(self, dtype: str) -> float:
        """FLOP/s of the fastest arithmetic XLA may choose for operands of this dtype: the rate of floors.

        It differs from `rate` for float32 on GPUs, whose matrix products run in tf32 unless
        `jax_default_matmul_precision` forbids it.

        Raises:
          UsageError: where the chip has no such rate.
        """
        return max(self.rate(dtype), self.peak.get("tf32", 0.0) if dtype == "float32" else 0.0)


def chip(name: str) -> Chip:
    """The chip of that name: v4, v5e, v5p, v6e, a100, h100, h200, b200.

    Raises:
      UsageError: for another name, with the nearest.
    """
    if name not in CHIPS:
        raise UsageError(f"{name!r} is no chip of the table. {did_you_mean(name, CHIPS)}")
    return CHIPS[name]


def _family(dtype: str) -> str:
    """All formats of eight-bit floats run at one rate, and so do signed and unsigned bytes."""
    if dtype.startswith("float8"):
        return "float8"
    return "int8" if dtype == "uint8" else dtype


# A TPU has no float32 matrix unit. XLA's default precision rounds float32 operands to bfloat16 and takes one
# pass, so the bfloat16 rate is the sound bound; precision "high" takes three passes and "highest" six.
_TPU_V4 = Chip(
    name="v4",
    peak={"bfloat16": 275e12, "float32": 275e12, "int8": 275e12},
    memory=int(30.5 * GIB),
    bandwidth=1.23e12,
    link=300e9,
    network=6.25e9,
    host_link=16e9,
    sources=(
        "rates [cloud] (275 TFLOP/s in bfloat16 or int8); memory [aot] (15.25 GiB a core); bandwidth "
        "[TpuInfo] ([cloud] 1200 GB/s); link [Lockwood] (six of 400 Gbit/s; [book] 45 GB/s each); network, "
        "host_link [book]"
    ),
)

_TPU_V5E = Chip(
    name="v5e",
    peak={"bfloat16": 197e12, "float32": 197e12, "int8": 394e12},
    memory=int(15.75 * GIB),
    bandwidth=820e9,
    link=200e9,
    network=3.125e9,
    host_link=16e9,
    sources=(
        "rates [cloud], [TpuInfo]; memory [aot]; bandwidth [TpuInfo] ([cloud] 819 GB/s); link [cloud] "
        "(400 GB/s both directions, four ports); network [cloud] (two cards of 100 Gbit/s for eight chips); "
        "host_link [book]"
    ),
)

_TPU_V5P = Chip(
    name="v5p",
    peak={"bfloat16": 459e12, "float32": 459e12, "float8": 459e12, "int8": 918e12},
    memory=int(95.73 * GIB),
    bandwidth=2765e9,
    link=600e9,
    network=6.25e9,
    host_link=16e9,
    sources=(
        "rates [cloud] in bfloat16 and float8; int8 [TpuInfo], [book]; memory [aot]; bandwidth [cloud] "
        "([TpuInfo] only 2460 GB/s); link [cloud] (1200 GB/s both directions, six ports); network [cloud] "
        "(50 Gbit/s a chip); host_link [book]"
    ),
)

_TPU_V6E = Chip(
    name="v6e",
    peak={"bfloat16": 920e12, "float32": 920e12, "float8": 920e12, "int8": 1840e12},
    memory=int(31.24 * GIB),
    bandwidth=1640e9,
    link=400e9,
    network=12.5e9,
    host_link=32e9,
    sources=(
        "rates [TpuInfo] ([cloud] 918 and 1836 TFLOP/s); memory [aot]; bandwidth [TpuInfo] ([cloud] "
        "1638 GB/s); link [cloud] (800 GB/s both directions, four ports); network, host_link [book]"
    ),
)

# float32 is the rate of the CUDA cores, tf32 that of the tensor cores on float32 operands.
_A100 = Chip(
    name="a100",
    peak={"bfloat16": 312e12, "float16": 312e12, "tf32": 156e12, "float32": 19.5e12, "int8": 624e12},
    memory=85_100_068_864,
    bandwidth=2.039e12,
    link=300e9,
    network=25e9,
    host_link=32e9,
    network_reduces=True,
    sources=(
        "SXM4 80 GB: rates, bandwidth [NVIDIA]; memory [XLA]; link [book] (12 NVLinks of 25 GB/s); network "
        "[DGX] (200 Gbit/s a GPU); host_link PCIe 4.0 x16"
    ),
)

_H100 = Chip(
    name="h100",
    peak={
        "bfloat16": 989.4e12,
        "float16": 989.4e12,
        "tf32": 494.7e12,
        "float32": 66.9e12,
        "float8": 1978.9e12,
        "int8": 1978.9e12,
    },
    memory=84_942_979_072,
    bandwidth=3.352e12,
    link=450e9,
    network=50e9,
    host_link=64e9,
    links_reduce=True,
    network_reduces=True,
    sources=(
        "SXM5 80 GB: rates [NVIDIA] = 132 cores x 4096 FLOP a clock x 1.83 GHz (bfloat16); memory, "
        "bandwidth [XLA]; link [book] (18 NVLinks of 25 GB/s); network [DGX] (400 Gbit/s a GPU); host_link "
        "PCIe 5.0 x16"
    ),
)

_H200 = dataclasses.replace(
    _H100,
    name="h200",
    memory=151_397_597_184,
    bandwidth=4.8e12,
    sources=(
        "SXM5 141 GB: the die of H100, so its rates, link, network and host_link; memory, bandwidth [XLA]"
    ),
)

_B200 = Chip(
    name="b200",
    peak={
        "bfloat16": 2250e12,
        "float16": 2250e12,
        "tf32": 1125e12,
        "float32": 80e12,
        "float8": 4500e12,
        "int8": 4500e12,
    },
    memory=191_514_411_008,
    bandwidth=8e12,
    link=900e9,
    network=50e9,
    host_link=64e9,
    links_reduce=True,
    network_reduces=True,
    sources=(
        "HGX, 1000 W: rates [NVIDIA] (tf32 printed as 1.1 PFLOP/s: half of bfloat16 here); memory [XLA]; "
        "bandwidth [NVIDIA] ([XLA] 7.67 TB/s); link [book] (18 NVLinks of 50 GB/s); network [DGX] "
        "(400 Gbit/s a GPU); host_link [DGX] (PCIe 5.0 x16)"
    ),
)

CHIPS: Mapping[str, Chip] = {
    held.name: held for held in (_TPU_V4, _TPU_V5E, _TPU_V5P, _TPU_V6E, _A100, _H100, _H200, _B200)
}
