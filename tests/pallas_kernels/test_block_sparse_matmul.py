"""The product with blocks: that of the matrix they make, of which nothing else is read."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse_matmul import OP, block_sparse_matmul, shapes
from pallas_kernels.op import Unsupported
from tests.pallas_kernels.cases.block_sparse_matmul import numbers, whole

WAYS = {
    "reference": dict(implementation="reference"),
    "tpu": dict(implementation="tpu", interpret=pltpu.InterpretParams()),
}


def multiplied(way, *arrays):
    return np.asarray(jax.jit(functools.partial(block_sparse_matmul, **WAYS[way]))(*arrays), np.float32)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("high", "wide", "blocks"), [(1, 1, 1), (3, 4, 5), (4, 5, 20)])
def test_is_the_product_with_the_matrix_that_blocks_make(way, high, wide, blocks):
    x, values, inputs, starts = numbers(3, high, wide, blocks)
    wanted = x.astype(np.float64) @ whole(values, inputs, starts, high)
    found = multiplied(way, x, values, inputs, starts)
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_whole_numbers_of_8_bits_are_exact(way, dtype, draw):
    """Also with x in bfloat16: it holds them, and sums are float32."""
    _, values, inputs, starts = numbers(1, 3, 3, 4)
    values = draw.integers(-127, 128, values.shape).astype(np.int8)
    x = draw.integers(-1, 2, (5, 3 * 128)).astype(dtype)
    exact = x.astype(np.int64) @ whole(values, inputs, starts, 3).astype(np.int64)
    found = multiplied(way, x, values, inputs, starts)
    np.testing.assert_array_equal(found, exact.astype(dtype).astype(np.float32))


def test_what_is_in_rows_without_blocks_does_not_matter():
    """Inputs that no block has are not read as zeros: they are not read at all."""
    x, values, inputs, starts = numbers(2, 4, 3, 3)
    clean = multiplied("tpu", x, values, inputs, starts)
    unread = np.setdiff1d(np.arange(4), inputs)
    assert unread.size
    x.reshape(2, 4, 128)[:, unread] = np.nan
    np.testing.assert_array_equal(multiplied("tpu", x, values, inputs, starts), clean)


@pytest.mark.parametrize("shape", shapes.SHAPES, ids=lambda shape: shape.name)
def test_work_and_bytes_are_those_of_the_blocks(shape):
    x, values, *_ = shape.arrays
    told = OP.cost(*shape.arrays)
    assert told.flops == 2 * x.shape[0] * values.size
    weights = values.size * values.dtype.itemsize
    assert weights <= told.bytes_accessed <= weights + x.shape[0] * (4096 + 14_336) * 2 + 10_000
    assert values.size / (4096 * 14_336) == pytest.approx(0.5 if "half" in shape.name else 0.2, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=(2, 3, 128)), "at least one row, block and column"),
        (dict(values=(0, 128, 128), inputs=(0,)), "at least one row, block and column"),
        (dict(starts=(1,)), "at least one row, block and column"),
        (dict(inputs=(5,)), "every block has an input"),
        (dict(x=(2, 200)), "blocks divide K"),
        (dict(dtype=jnp.int32), "values of the same type or int8, not int32 and float32"),
        (dict(dtype=jnp.bfloat16), "not bfloat16 and float32"),
        (dict(index=jnp.float32), "inputs are integers, not float32"),
        (dict(implementation="gpu"), "no kernel for the gpu"),
        (
            dict(values=(4, 64, 128), implementation="tpu"),
            "multiples of 128 inputs and outputs, not 64 by 128",
        ),
        (dict(x=(2, 128 * 4000), implementation="tpu"), "cut the matrix"),
    ],
)
def test_what_does_not_fit_is_said(change, message):
    told = dict(x=(2, 384), values=(4, 128, 128), inputs=(4,), starts=(3,), dtype=jnp.float32) | change
    index = told.get("index", jnp.int32)
    arrays = (
        jax.ShapeDtypeStruct(told["x"], told["dtype"]),
        jax.ShapeDtypeStruct(told["values"], jnp.float32),
        jax.ShapeDtypeStruct(told["inputs"], index),
        jax.ShapeDtypeStruct(told["starts"], jnp.int32),
    )
    call = functools.partial(block_sparse_matmul, implementation=told.get("implementation"))
    with pytest.raises(Unsupported, match=message):
        jax.eval_shape(call, *arrays)
