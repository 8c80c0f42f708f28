"""The step over active neurons: plain sums in its limits, and only the rows of active ones are fetched."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import grids
from pallas_kernels.op import Unsupported
from pallas_kernels.sparse_ffn import OP, cost, shapes, sparse_ffn
from tests.pallas_kernels.cases.sparse_ffn import numbers

WAYS = {
    "reference": dict(implementation="reference"),
    "tpu": dict(implementation="tpu", interpret=pltpu.InterpretParams()),
}


def stepped(way, *arrays, **options):
    call = functools.partial(sparse_ffn, **WAYS[way], **options)
    return jax.jit(call)(*arrays)


def by_hand(gate, x, expand, contract):
    """Neuron by neuron in float64."""
    y = np.zeros(contract.shape[1])
    for f in np.flatnonzero(gate):
        y += float(gate[f]) * (expand[f].astype(float) @ x.astype(float)) * contract[f].astype(float)
    return y


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("active", [0, 1, 127, 128, 129, 300])
def test_any_number_of_active_neurons(way, active):
    arrays = numbers(300, active)
    wanted = by_hand(*arrays)
    np.testing.assert_allclose(stepped(way, *arrays), wanted, atol=1e-5 * max(np.abs(wanted).max(), 1))


@pytest.mark.parametrize("active", [20, 280])
@pytest.mark.parametrize(("dtype", "together"), [(np.float32, 1), (jnp.bfloat16, 2)])
def test_no_row_is_fetched_that_does_not_stand_with_an_active_one(dtype, together, active):
    """What is never fetched may be anything: a product of it with a gate of 0 would show."""
    gate, x, expand, contract = numbers(300, active)
    gate[:together] = 0  # what a group that is not full is filled up with may be the first row
    units = (gate.reshape(-1, together) != 0).any(1)
    passive = ~np.repeat(units, together)
    clean = stepped("tpu", *(array.astype(dtype) for array in (gate, x, expand, contract)))
    expand[passive], contract[passive] = np.nan, np.inf
    found = stepped("tpu", *(array.astype(dtype) for array in (gate, x, expand, contract)))
    np.testing.assert_array_equal(found, clean)


def test_hidden_numbers_of_bfloat16_lose_no_bits():
    """Products that nearly cancel: the reference rounds them to bfloat16, and hardly a digit is left."""
    gate, x, expand, contract = numbers(128, 128)
    gate, expand[1::2], contract[1::2] = np.ones_like(gate), expand[::2], -contract[::2]
    expand[1::2, 0] += 2**-5
    half = [array.astype(jnp.bfloat16) for array in (gate, x, expand, contract)]
    exact = by_hand(*(array.astype(np.float32) for array in half))
    off = {way: np.abs(np.asarray(stepped(way, *half), np.float32) - exact).max() for way in WAYS}
    assert off["tpu"] <= 2**-7 * np.abs(exact).max()
    assert off["reference"] > 2**-3 * np.abs(exact).max()


def test_a_token_of_float32_with_matrices_of_bfloat16():
    gate, x, expand, contract = numbers(200, 90)
    expand, contract = expand.astype(jnp.bfloat16), contract.astype(jnp.bfloat16)
    found = stepped("tpu", gate, x, expand, contract)
    assert found.dtype == jnp.float32
    wanted = by_hand(gate, x, *(array.astype(np.float32) for array in (expand, contract)))
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


def test_derivatives_are_those_of_the_specification():
    arrays = numbers(130, 40)
    slope = lambda way: jax.jit(jax.grad(lambda *a: jnp.sum(stepped(way, *a) ** 2), (0, 1, 2, 3)))(*arrays)
    for have, want in zip(slope("tpu"), slope("reference"), strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("shape", shapes.SHAPES, ids=lambda shape: shape.name)
def test_bytes_are_those_of_active_rows_and_of_their_pairs(shape):
    gate, _, expand, contract = shape.arrays
    active, row = shape.options["active"], (expand.shape[1] + contract.shape[1]) * expand.dtype.itemsize
    told = OP.cost(*shape.arrays, **shape.options)
    assert active * row <= told.bytes_accessed <= active * row + 200_000
    assert told.flops == 2 * active * (expand.shape[1] + contract.shape[1])

    call = functools.partial(sparse_ffn, **shape.options, implementation="tpu")
    ((equation, operands),) = grids.pallas_calls(jax.make_jaxpr(call)(*shape.arrays).jaxpr, shape.arrays)
    together = 4 // expand.dtype.itemsize
    drawn = np.random.default_rng(0).permutation(gate.size)[:active] // together
    fetched = together * np.unique(drawn).size
    assert grids.traffic(equation, operands) == pytest.approx(fetched * row, rel=0.03)


def test_rows_that_come_in_pairs():
    assert cost.fetched(active=0, neurons=100, together=2) == 0
    assert cost.fetched(active=100, neurons=100, together=2) == 100
    assert cost.fetched(active=50, neurons=100, together=2) == 75
    assert cost.fetched(active=50, neurons=100, together=1) == 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(gate=(1, 12)), r"takes one token: gate \[F\]"),
        (dict(gate=(13,)), "do not fit"),
        (dict(x=(64,)), "do not fit"),
        (dict(contract=(11, 128)), "do not fit"),
        (dict(contract=(12, 0)), "at least one"),
        (dict(dtype=jnp.int8), "gate and x of one type, float32, bfloat16, float16, not int8"),
        (dict(active=-1), "active=-1"),
        (dict(implementation="gpu"), "no kernel for the gpu"),
        (dict(implementation="tpu", dtype=jnp.float16), "takes bfloat16 or float32, and x is float16"),
        (
            dict(implementation="tpu", x=(72,), expand=(12, 72)),
            "multiple of 128 channels, and those of expand",
        ),
        (dict(implementation="tpu", contract=(12, 72)), "those of contract have 72"),
        (
            dict(implementation="tpu", dtype=jnp.bfloat16, gate=(13,), expand=(13, 128), contract=(13, 128)),
            "in pairs, which 13 neurons do not make",
        ),
    ],
)
def test_bad_arguments(change, message):
    given = dict(gate=(12,), x=(128,), expand=(12, 128), contract=(12, 128))
    given |= {name: change.pop(name) for name in list(change) if name in given}
    dtype = np.dtype(change.pop("dtype", np.float32))
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in given.values()]
    with pytest.raises(Unsupported, match=message):
        jax.eval_shape(functools.partial(sparse_ffn, **change), *arrays)


def test_matrices_of_two_types():
    arrays = [jax.ShapeDtypeStruct(shape, np.float32) for shape in ((12,), (128,), (12, 128))]
    with pytest.raises(Unsupported, match="expand and contract of one type"):
        jax.eval_shape(sparse_ffn, *arrays, jax.ShapeDtypeStruct((12, 128), jnp.bfloat16))
