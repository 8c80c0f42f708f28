"""Names of topologies, and what they need."""

import importlib.util
import re

import pytest

from effjax.errors import UsageError
from effjax.measure.chips import CHIPS
from effjax.plan import topology
from effjax.plan.topology import GPUS, Topology


@pytest.mark.parametrize(
    ("text", "platform", "devices", "per_host"),
    [
        ("v5p:8x8x8", "tpu", 512, 512),
        ("v5e:16x16", "tpu", 256, 256),
        ("v6e:1x1", "tpu", 1, 1),
        ("V4:2x2x1", "tpu", 4, 4),
        ("h100:8", "cuda", 8, 8),
        ("h200:8x4", "cuda", 32, 8),
        ("cpu:8", "cpu", 8, 8),
    ],
)
def test_names(text, platform, devices, per_host):
    found = Topology.parse(text)
    assert (found.platform, found.devices, found.per_host) == (platform, devices, per_host)
    assert str(found) == text.lower()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5e", "--topology=v5e is no topology. Write a chip and its layout: v5p:8x8x8"),
        ("v5e:0x4", "is no topology"),
        ("h300:8", "'h300' is no chip. Did you mean 'h"),
        ("v5e:3x5", "the first two sides must be even"),
        ("v5p:4x4", "v5p chips form a torus of 3 dimensions, not 2"),
        ("h100:16", "a host holds at most 8 GPUs: 16 of them are 8x2"),
        ("h100:8x4x2", "GPUs are counted a host, then hosts"),
        ("cpu:2x2", "devices of a CPU are just a number"),
    ],
)
def test_what_is_no_topology(text, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        Topology.parse(text)


def test_every_chip_of_the_table_can_be_planned_for():
    for chip in CHIPS:
        layouts = [text for text in (f"{chip}:2x2x1", f"{chip}:2x2") if parses(text)]
        assert layouts, chip
        assert (Topology.parse(layouts[0]).platform == "cuda") == (chip in GPUS)


def parses(text):
    try:
        Topology.parse(text)
    except UsageError:
        return False
    return True


@pytest.mark.parametrize(
    ("chip", "missing", "extra"),
    [("v5e:2x2", "libtpu", "tpu-aot"), ("h100:8", "jax_plugins.xla_cuda13", "cuda-aot")],
)
def test_a_compiler_that_is_not_installed_is_named(monkeypatch, chip, missing, extra):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        topology.importlib.util, "find_spec", lambda name: None if name == missing else find(name)
    )
    with pytest.raises(UsageError, match=rf"{missing} is not installed: pip install 'effjax\[{extra}\]'"):
        Topology.parse(chip).check_installed()
    Topology.parse("cpu:8").check_installed()


def test_the_environment_keeps_what_the_user_set(monkeypatch):
    monkeypatch.setenv(
        "XLA_FLAGS", "--xla_force_host_platform_device_count=3 --xla_cpu_enable_fast_math=false"
    )
    flags = Topology.parse("cpu:8").environment()["XLA_FLAGS"].split()
    assert flags == ["--xla_cpu_enable_fast_math=false", "--xla_force_host_platform_device_count=8"]


def test_the_environment_leaves_a_cpus_flags_out_for_an_accelerator(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false --xla_llvm_any=1 --xla_dump_to=here")
    assert Topology.parse("v5e:4x4").environment()["XLA_FLAGS"] == "--xla_dump_to=here"
