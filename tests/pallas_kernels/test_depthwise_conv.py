"""Depthwise convolution by its kernel: the sum in float64, maps that share a register, and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.depthwise_conv import depthwise_conv
from pallas_kernels.op import Unsupported
from tests.pallas_kernels.cases.depthwise_conv import numbers

TPU = dict(implementation="tpu", interpret=pltpu.InterpretParams())


def brute(x, kernel, bias):
    """The sum as the docstring has it, in float64."""
    y = np.zeros(x.shape) + bias
    high, wide = kernel.shape[:2]
    for i, j, u, v in np.ndindex(*x.shape[1:3], high, wide):
        row, column = i + u - (high - 1) // 2, j + v - (wide - 1) // 2
        if 0 <= row < x.shape[1] and 0 <= column < x.shape[2]:
            y[:, i, j] += x[:, row, column].astype(np.float64) * kernel[u, v]
    return y


@pytest.mark.parametrize("how", [dict(implementation="reference"), TPU], ids=["reference", "tpu"])
@pytest.mark.parametrize("sides", [(3, 3), (4, 5)])
def test_is_the_sum(how, sides):
    arrays = numbers(1, 6, 5, 2, *sides)
    np.testing.assert_allclose(depthwise_conv(*arrays, **how), brute(*arrays), rtol=1e-4, atol=1e-5)


def test_a_map_that_is_no_number_spoils_no_other_one():
    """Eight maps stand in one register."""
    x, kernel, bias = numbers(8, 3, 3, 2, 3, 3)
    x[3] = np.nan
    y = np.array(depthwise_conv(x, kernel, bias, **TPU))
    assert np.isnan(y[3]).all()
    np.testing.assert_allclose(
        np.delete(y, 3, 0), np.delete(brute(x, kernel, bias), 3, 0), rtol=1e-4, atol=1e-5
    )


def test_without_a_bias():
    x, kernel, _ = numbers(1, 4, 4, 2, 3, 3)
    slopes = jax.grad(lambda k: jnp.sum(depthwise_conv(x, k, activation="relu", **TPU)))(jnp.asarray(kernel))
    plain = lambda k: jnp.sum(depthwise_conv(x, k, activation="relu", implementation="reference"))
    np.testing.assert_allclose(slopes, jax.grad(plain)(jnp.asarray(kernel)), rtol=1e-4)


def shaped(x, kernel, bias=None, dtype=jnp.float32, **options):
    arrays = [None if shape is None else jax.ShapeDtypeStruct(shape, dtype) for shape in (x, kernel, bias)]
    jax.eval_shape(lambda *arrays: depthwise_conv(*arrays, **options), *arrays)


@pytest.mark.parametrize(
    ("arguments", "options", "told"),
    [
        (((2, 4, 4, 3), (3, 3, 4)), {}, "maps .B, H, W, C. and kernels"),
        (((2, 4, 4, 3), (3, 3, 3), (4,)), {}, "no bias of"),
        (((2, 4, 4, 3), (33, 3, 3)), {}, "1 to 31 places a side"),
        (((2, 0, 4, 3), (3, 3, 3)), {}, "maps with places"),
        (((2, 4, 4, 3), (3, 3, 3)), dict(dtype=jnp.int32), "float32, bfloat16, float16, not int32"),
        (((2, 4, 4, 3), (3, 3, 3)), dict(activation="tanh"), "none of none, relu, silu, gelu"),
        (((2, 4, 4, 3), (3, 3, 3)), dict(implementation="gpu"), "no kernel for the gpu"),
        (((2, 4, 4, 3), (3, 3, 3)), dict(implementation="tpu", dtype=jnp.float16), "not float16"),
        (((1, 400, 400, 3), (3, 3, 3)), dict(implementation="tpu"), "400 x 400 places"),
    ],
)
def test_what_is_refused(arguments, options, told):
    with pytest.raises(Unsupported, match=told):
        shaped(*arguments, **options)
