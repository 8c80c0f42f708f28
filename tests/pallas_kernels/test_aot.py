"""What is read from compilers' reports, and one compile of each kind where the compilers are installed."""

import importlib.util
import shutil

import jax
import pytest

from pallas_kernels import aot, aot_child, grids
from pallas_kernels.aot import Row, Target
from pallas_kernels.sigmoid_attention import shapes, sigmoid_attention

REPORT = """ptxas info    : Compiling entry function 'first_mosaic_gpu_kernel' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 138 registers, used 2 barriers, 1 bytes smem
  call void @mosaic_gpu_launch_kernel(ptr %0, i32 1, i32 8, i32 32, i32 0, i32 0, i32 0, i32 128, i32 1, i32 1, i32 98328, ptr %1, ptr %409)
ptxas info    : Compiling entry function 'second_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : (C7512) Potential Performance Loss: wgmma.mma_async instructions are serialized
    872 bytes stack frame, 1136 bytes spill stores, 1132 bytes spill loads
ptxas info    : Used 255 registers, used 2 barriers
  call void @mosaic_gpu_build_kernel_spec(ptr %0, i32 1, i32 2, i32 32, i32 0, i32 0, i32 0, i32 128, i32 1, i32 1, i32 400, i32 0, ptr %3)
"""  # noqa: E501


def test_reports_of_ptxas():
    first, second = aot_child.ptxas(REPORT)
    assert first == dict(
        name="first",
        registers=138,
        spilled=0,
        serialised=False,
        shared=98_328,
        threads=128,
        blocks=2,  # 233,472 / (98,328 + 1,024), fewer than by registers
        occupancy=0.125,
    )
    assert (second["name"], second["spilled"], second["serialised"]) == ("second", 1136, True)
    row = Row("kernel", "shape", Target("h200", "gpu"), dict(kernels=[first, second], xla=dict(temporary=1)))
    spilled, serialised = row.faults()
    assert "second: 1136 bytes are spilled" in spilled
    assert "second: wgmma is serialised" in serialised


CALL = (
    '%{} = f32[8] custom-call(%x), custom_call_target="tpu_custom_call", backend_config={{'
    '"used_scoped_memory_configs":[{{"memory_space":"1","offset":"0","size":"{}"}}],'
    '"scoped_memory_configs":[{{"memory_space":"1","offset":"{}","size":"900"}}]}}'
)


def test_vector_memory_of_a_kernel_among_others_with_arrays_before_it():
    text = "\n".join(
        [
            CALL.format("jvp_scan_.1", 700, 600),
            CALL.format("transpose_jvp_scan_starts__.1.references_5_", 50, 0),
            "%scan_back.1 = f32[8] fusion(%x)",
        ]
    )
    assert aot_child._vector_memory(text, "scan") == 100
    assert aot_child._vector_memory(text, "scan_starts") == 50
    assert aot_child._vector_memory(text, "scan_back") == 0


FOUND = dict(around=2, bandwidth=2e12, xla=dict(bytes=12, microseconds=1))


@pytest.mark.parametrize(
    ("cycles", "moved", "holds"), [(None, 9, True), (None, 11, False), (100, 11, True), (3000, 11, False)]
)
def test_a_kernel_needs_fewer_bytes_or_less_time(cycles, moved, holds):
    part = dict(bytes=moved, cycles=cycles, microseconds=cycles and cycles / 1e3)
    row = Row("kernel", "shape", Target("v5e", "tpu"), FOUND | dict(kernels=[part]))
    told = "kernel shape v5e: neither fewer bytes nor less time than XLA's own code"
    assert list(row.faults()) == ([] if holds else [told])


def test_what_did_not_compile_is_told():
    row = Row("kernel", "shape", Target("v5e", "tpu"), dict(failed="vmem is too small"))
    assert list(row.faults()) == ["kernel shape v5e: does not compile: vmem is too small"]
    assert "vmem is too small" in aot.tables([row])


def test_blocks_move_where_their_index_changes():
    """Causal attention of four blocks: ten tiles of keys are fetched, and each tile of queries once."""
    q = jax.ShapeDtypeStruct((1, 2048, 1, 64), "bfloat16")
    traced = jax.make_jaxpr(lambda q: sigmoid_attention(q, q, q, causal=True, implementation="tpu"))(q)
    ((equation, operands),) = grids.pallas_calls(traced.jaxpr, q)
    tile = 512 * 64 * 2
    # Queries and results: 4 each. Keys and values: 1 + 2 + 3 + 4 less the first of row 1, where row 0 ended.
    assert grids.traffic(equation, operands) == tile * (4 + 4 + 2 * (10 - 1))


@pytest.mark.slow
@pytest.mark.parametrize(("target", "implementation"), [("v5e", "tpu"), ("h200", "gpu")])
def test_compiles_for_what_is_not_here(target, implementation):
    needed = "libtpu" if implementation == "tpu" else "jax_plugins.xla_cuda13"
    try:
        present = importlib.util.find_spec(needed) is not None
    except ModuleNotFoundError:
        present = False
    if not present or (implementation == "gpu" and not shutil.which("ptxas") and not _wheel_of_ptxas()):
        pytest.skip(f"the compiler for {target} is not installed")
    found = aot._child(
        "sigmoid_attention", shapes.SHAPES[0].name, Target(target, implementation), implementation
    )
    assert "failed" not in found
    assert len(found["kernels"]) == 3


def _wheel_of_ptxas():
    return (
        importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.cu13") is not None
    )
