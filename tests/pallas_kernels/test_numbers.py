"""Every implementation of every kernel against the float32 reference: values and cotangents."""

import importlib

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import KERNELS
from tests.pallas_kernels.cases import TOLERANCE

CASES = {name: importlib.import_module(f"tests.pallas_kernels.cases.{name}").CASE for name in KERNELS}
IMPLEMENTATIONS = [
    (name, implementation, dtype)
    for name, case in CASES.items()
    for implementation, dtypes in case.dtypes.items()
    for dtype in dtypes
]
FIXED = [
    (name, implementation, dtypes[0], fixed)
    for name, case in CASES.items()
    for implementation, dtypes in case.dtypes.items()
    for fixed in case.fixed
]
INTERPRETERS = dict(tpu=pltpu.InterpretParams(detect_races=True), gpu=True)


def evaluate(case, arrays, cotangent, options):
    """The value, and cotangents of the arguments; the cotangent of the value is drawn where none is given."""
    call = lambda *some: case.function(*some, *arrays[case.differentiated :], **options)
    some = arrays[: case.differentiated]
    if cotangent is None:
        drawn = np.random.default_rng(1).normal(size=jax.eval_shape(call, *some).shape)
        cotangent = drawn.astype(arrays[0].dtype)

    def both(cotangent, *some):
        y, pullback = jax.vjp(call, *some)
        return (y, *pullback(cotangent))

    return cotangent, jax.jit(both)(cotangent, *some)


def compare(case, implementation, dtype, arrays, options, interpret):
    """Both on the same rounded numbers: the reference in float32."""
    dtype = jnp.dtype(dtype)
    rounded = [array.astype(dtype) if array.dtype == np.float32 else array for array in arrays]
    exact = [array.astype(np.float32) if array.dtype == dtype else array for array in rounded]
    how = dict(implementation=implementation, interpret=interpret)
    cotangent, found = evaluate(case, rounded, None, options | how)
    _, wanted = evaluate(
        case, exact, cotangent.astype(np.float32), options | dict(implementation="reference")
    )
    # Numbers below the smallest of a type are lost, those that enter a sum too.
    lost = 8 * float(jnp.finfo(dtype).smallest_subnormal)
    for want, have in zip(wanted, found, strict=True):
        assert (have.dtype, have.shape) == (dtype, want.shape)
        off = np.abs(np.asarray(have, np.float32) - np.asarray(want)).max()
        assert off <= TOLERANCE[dtype.name] * np.abs(want).max() + lost


@pytest.mark.parametrize(("name", "implementation", "dtype"), IMPLEMENTATIONS)
def test_equals_the_reference(name, implementation, dtype):
    case = CASES[name]

    @hypothesis.settings(max_examples=3, derandomize=True, deadline=None, database=None)
    @hypothesis.given(arguments=case.arguments)
    def check(arguments):
        interpret = pltpu.InterpretParams() if implementation == "tpu" else True
        compare(case, implementation, dtype, *arguments, interpret)

    check()


@pytest.mark.parametrize(("name", "implementation", "dtype", "fixed"), FIXED)
def test_equals_the_reference_at_an_edge(name, implementation, dtype, fixed, capfd):
    compare(CASES[name], implementation, dtype, *CASES[name].fixed[fixed](), INTERPRETERS[implementation])
    assert "RACE DETECTED" not in "".join(capfd.readouterr())
