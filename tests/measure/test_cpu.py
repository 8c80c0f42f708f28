"""Floors are floors: nothing runs faster than what `measure_cpu` says the CPU in front of us can do."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.errors import UsageError
from effjax.measure import count, floor, measure_cpu, time_function
from tests.train.toy import FAMILIES, program_of

# The tests compile cheaply, see conftest.py; here the fastest code is the hardest case.
OPTIMISED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}


@pytest.fixture(scope="module")
def cpu():
    return measure_cpu(2.0)


def bytes_of(tree):
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def floor_and_time(function, inputs, chip, dtype):
    """The floor of a function that reads its inputs and writes its results once, and its measured time."""
    work = count(function, *inputs, parameters=None)
    assert not work.unknown
    moved = bytes_of(inputs) + bytes_of(jax.eval_shape(function, *inputs))
    held = floor((work.flops, dtype), moved, chip)
    compiled = jax.jit(function, compiler_options=OPTIMISED)
    return held, time_function(compiled, inputs, warmup=2, repeats=5)


def array(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)


PROGRAMS = {
    "matrix product 512": (jnp.dot, [(512, 512), (512, 512)]),
    "matrix product 1024": (jnp.dot, [(1024, 1024), (1024, 1024)]),
    "tall matrix product": (jnp.dot, [(8192, 256), (256, 256)]),
    "batched matrix product": (lambda x, y: jnp.einsum("bij,bjk->bik", x, y), [(64, 128, 128)] * 2),
    "matrix and vector": (jnp.dot, [(2048, 2048), (2048,)]),
    "gram matrix": (lambda x: x @ x.T, [(1024, 512)]),
    "convolution": (
        lambda x, k: jax.lax.conv_general_dilated(
            x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        [(4, 32, 32, 64), (3, 3, 64, 64)],
    ),
    "add, 64 KiB": (jnp.add, [(2**14,)] * 2),
    "add, 1 MiB": (jnp.add, [(2**18,)] * 2),
    "add, 8 MiB": (jnp.add, [(2**21,)] * 2),
    "add, 32 MiB": (jnp.add, [(2**23,)] * 2),
    "exponential": (jnp.exp, [(2**20,)]),
    "maximum": (jnp.max, [(2**22,)]),
    "sum of rows": (lambda x: x.sum(1), [(2048, 2048)]),
    "transpose": (lambda x: x.T + 1, [(2048, 1024)]),
    "concatenate": (lambda x, y: jnp.concatenate([x, y]), [(2**21,)] * 2),
    "repeat": (lambda x: jnp.broadcast_to(x[None], (16, *x.shape)), [(2**18,)]),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_no_program_is_faster_than_its_floor(cpu, name, dtype):
    function, shapes = PROGRAMS[name]
    inputs = tuple(array(*shape, dtype=dtype) for shape in shapes)
    held, measured = floor_and_time(function, inputs, cpu, inputs[0].dtype.name)
    assert 0 < held.seconds <= measured.median, (held.bound, held.seconds / measured.median)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_no_model_is_faster_than_its_floor(cpu, family):
    program = program_of(family)
    precision = program.experiment.train.precision

    def forward(variables, batch):
        return program.task.metrics(precision.cast(variables), batch)

    variables = program.variables(program.init(), ema=False)
    batch = dict(jax.tree.map(jnp.asarray, dict(program.data.example_batch(8))), mask=jnp.ones(8))
    held, measured = floor_and_time(forward, (variables, batch), cpu, "bfloat16")
    assert 0 < held.seconds <= measured.median, (held.bound, held.seconds / measured.median)


@pytest.mark.slow
def test_floors_are_not_idle(cpu):
    """A floor of zero would always hold: the best runs of good programs come near it."""
    held, measured = floor_and_time(jnp.dot, (array(768, 768),) * 2, cpu, "float32")
    assert held.bound == "compute"
    assert held.seconds > 0.2 * min(measured.runs)
    held, measured = floor_and_time(jnp.add, (array(2**20),) * 2, cpu, "float32")
    assert held.bound == "memory"
    assert held.seconds > 0.02 * min(measured.runs)


def test_the_figures_are_of_a_cpu(cpu):
    assert cpu.name == "cpu"
    assert cpu.rate("bfloat16") >= cpu.rate("float32") > 1e9
    assert cpu.bandwidth > cpu.uncached > 1e8
    assert cpu.memory > 2**30
    assert "cores" in cpu.sources


def test_no_time_is_a_usage_error():
    with pytest.raises(UsageError, match="seconds=0"):
        measure_cpu(0)
