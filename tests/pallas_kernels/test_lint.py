"""One deliberately wrong kernel for every fault, and clean ones of which nothing is said."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import emulate, versions
from pallas_kernels.lint import lint, masks


def double(x, out):
    out[...] = x[...] * 2


def rows(size, index=lambda i: (i, 0)):
    return pl.BlockSpec((size, 128), index)


def tpu_kernel(grid, into, outof, shape=(64, 128), out=None, semantics=None, **more):
    """Doubles blocks of a matrix."""
    semantics = semantics or ("parallel",) * len(grid)
    return lambda x: pl.pallas_call(
        double,
        grid=grid,
        in_specs=[into],
        out_specs=outof,
        out_shape=jax.ShapeDtypeStruct(out or shape, jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
        name="double",
        **more,
    )(x)


def linted(kernel, *shape):
    return lint(kernel, jax.ShapeDtypeStruct(shape or (64, 128), jnp.float32))


def test_clean():
    assert linted(tpu_kernel((4,), rows(16), rows(16))) == []


def test_ragged_edge():
    ragged = functools.partial(tpu_kernel, (4,), rows(16), rows(16), shape=(50, 128))
    found = linted(ragged(), 50, 128)
    assert len(found) == 2
    assert "in[0] (50, 128) is not divided by its block (16, 128)" in found[0]
    assert "out[0]" in found[1]
    assert len(linted(ragged(metadata=masks("in[0]")), 50, 128)) == 1
    assert linted(ragged(metadata=masks("in[0]", "out[0]")), 50, 128) == []


def test_offsets_beyond_32_bits():
    found = linted(tpu_kernel((2**18,), rows(128), rows(128), shape=(2**25, 128)), 2**25, 128)
    assert len(found) == 2
    assert all("more than 2^31 elements" in line for line in found)


def test_index_map_that_leaves_the_array():
    (found,) = linted(tpu_kernel((4,), rows(16, lambda i: (i + 1, 0)), rows(16)))
    assert "in[0] (64, 128): its index map leaves the array at program (3,)" in found


def test_output_block_that_is_never_written():
    (found,) = linted(tpu_kernel((3,), rows(16), rows(16)))
    assert "only 3 of 4 blocks are written" in found


def test_output_block_that_parallel_programs_write():
    shared = functools.partial(
        tpu_kernel, (4, 2), rows(16, lambda i, j: (i, 0)), rows(16, lambda i, j: (i, 0))
    )
    (found,) = linted(shared())
    assert "4 times programs that run at once write the same block: a race" in found
    assert linted(shared(semantics=("parallel", "arbitrary"))) == []


def test_output_block_that_comes_again():
    """Sequential programs may add to a block as long as they stay at it."""
    again = tpu_kernel(
        (2, 4), rows(16, lambda j, i: (i, 0)), rows(16, lambda j, i: (i, 0)), semantics=("arbitrary",) * 2
    )
    (found,) = linted(again)
    assert "4 times a block is left and comes again: what it held is lost" in found


def test_compiler_that_is_not_named():
    kernel = pl.pallas_call(
        double,
        grid=(4,),
        in_specs=[rows(16)],
        out_specs=rows(16),
        out_shape=jax.ShapeDtypeStruct((64, 128), "f4"),
    )
    (found,) = linted(kernel)
    assert "no compiler_params" in found


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("warps", [3, 64])
def test_too_many_threads_of_triton(warps):
    from jax.experimental.pallas import triton

    kernel = pl.pallas_call(
        double,
        grid=(4,),
        in_specs=[rows(16)],
        out_specs=rows(16),
        out_shape=jax.ShapeDtypeStruct((64, 128), "f4"),
        compiler_params=triton.CompilerParams(num_warps=warps),
    )
    (found,) = linted(kernel)
    assert f"num_warps={warps}" in found


def test_index_map_that_reads_scalars():
    """Prefetched scalars decide which block comes; arrays tell the linter what they are."""
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(4,),
        in_specs=[pl.BlockSpec((16, 128), lambda i, table: (table[i], 0))],
        out_specs=pl.BlockSpec((16, 128), lambda i, table: (i, 0)),
    )
    kernel = pl.pallas_call(
        lambda table, x, out: double(x, out),
        grid_spec=spec,
        out_shape=jax.ShapeDtypeStruct((64, 128), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        name="gather",
    )
    x = jax.ShapeDtypeStruct((64, 128), jnp.float32)
    assert lint(kernel, np.array([3, 1, 0, 2], np.int32), x) == []
    (found,) = lint(kernel, np.array([3, 1, 0, 4], np.int32), x)
    assert "leaves the array at program (3,)" in found
    (found,) = lint(kernel, jax.ShapeDtypeStruct((4,), jnp.int32), x)
    assert "depends on values" in found


def copying(fault=None, length=128, programs=2):
    """A Mosaic GPU kernel that copies 64 rows a program by way of shared memory, with one fault."""
    plgpu = versions.mosaic_gpu()

    def body(x, out, tile, arrived):
        i = lax.axis_index("rows")
        source = i + 1 if fault == "reads outside" else i
        target = lax.div(i, 2) if fault == "overlap" else i
        plgpu.copy_gmem_to_smem(x.at[pl.ds(source * 64, 64)], tile, arrived)
        if fault != "no wait":
            plgpu.barrier_wait(arrived)
        if fault == "hang":
            plgpu.barrier_wait(arrived)
        if fault == "no commit":
            tile[...] = tile[...] * 2
        plgpu.copy_smem_to_gmem(tile, out.at[pl.ds(target * 64, 64)])
        if fault == "overwritten":
            tile[...] = tile[...] * 0
        if fault != "no end":
            plgpu.wait_smem_to_gmem(0)

    return versions.mosaic_gpu_kernel(
        body,
        out=jax.ShapeDtypeStruct((length, 64), jnp.float32),
        scratch=[plgpu.SMEM((64, 64), jnp.float32), plgpu.Barrier()],
        grid=(programs,),
        grid_names=("rows",),
        name="copying",
    )


def test_clean_on_a_gpu(draw):
    x = draw.normal(size=(128, 64)).astype(np.float32)
    assert linted(copying(), 128, 64) == []
    np.testing.assert_array_equal(jax.jit(emulate.emulated(copying()))(x), x)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("reads outside", "copying: in[0]: indices 128 to 191 leave an axis of 128"),
        ("overlap", "out[0]: two programs write the same elements"),
        ("overlap", "out[0]: 4096 of 8192 elements are never written"),
        ("hang", "a barrier waits for 1 copies and 0 are under way: a hang"),
        ("no end", "a program ends before its copies to global memory do"),
        ("no commit", "without commit_smem"),
    ],
)
def test_faults_on_a_gpu(fault, message):
    assert any(message in line for line in linted(copying(fault), 128, 64))


def test_output_that_is_too_long_on_a_gpu():
    assert any(
        "64 of 192" not in line and "never written" in line for line in linted(copying(length=192), 128, 64)
    )


@pytest.mark.parametrize("fault", ["no wait", "overwritten"])
def test_what_is_not_waited_for_is_not_there(fault, draw):
    """Copies land where they are waited for: without that the numbers are wrong."""
    x = draw.normal(size=(128, 64)).astype(np.float32)
    found = np.asarray(jax.jit(emulate.emulated(copying(fault)))(x))
    assert not np.array_equal(found, x)


def test_too_many_threads_on_a_gpu():
    kernel = versions.mosaic_gpu_kernel(
        lambda x, out: None,
        out=jax.ShapeDtypeStruct((64,), jnp.float32),
        scratch=[],
        grid=(1,),
        grid_names=("rows",),
        name="wide",
        warpgroups=9,
    )
    (found,) = lint(kernel, jax.ShapeDtypeStruct((64,), jnp.float32))
    assert found == "wide: 1152 threads a block, 1024 at most"


def test_branches_that_depend_on_values_are_all_followed_on_a_gpu():
    plgpu = versions.mosaic_gpu()

    def body(x, out, tile, arrived):
        i = lax.axis_index("rows")
        plgpu.copy_gmem_to_smem(x.at[pl.ds(i * 64, 64)], tile, arrived)
        plgpu.barrier_wait(arrived)
        for shift, chosen in ((0, tile[0, 0] > 0), (1, tile[0, 0] <= 0)):

            @pl.when(chosen)
            def _(shift=shift):
                plgpu.copy_smem_to_gmem(tile, out.at[pl.ds((i + shift) * 64, 64)])
                plgpu.wait_smem_to_gmem(0)

    kernel = versions.mosaic_gpu_kernel(
        body,
        out=jax.ShapeDtypeStruct((64, 64), jnp.float32),
        scratch=[plgpu.SMEM((64, 64), jnp.float32), plgpu.Barrier()],
        grid=(1,),
        grid_names=("rows",),
        name="choosing",
    )
    (found,) = linted(kernel, 64, 64)
    assert "out[0]: indices 64 to 127 leave an axis of 64" in found
