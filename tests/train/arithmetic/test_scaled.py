"""Products of codes by qwix: what they are, and what they are on the way back."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from effjax.layers.dense import Dense
from effjax.train.arithmetic.products import Operand
from effjax.train.arithmetic.scaled import Float8, Int8


class Product(nn.Module):
    """A Dense layer whose kernel is an operand, as the training step makes it."""

    features: tuple[int, ...]
    inputs: int
    axes: tuple[str | None, ...]

    @nn.compact
    def __call__(self, x):
        return Dense(self.features, self.axes, inputs=self.inputs, use_bias=False, name="dense")(x)


def product(arithmetic, x, kernel, g, ins=1):
    """y, dL/dx and dL/dW, where g is dL/dy."""
    layer = Product(kernel.shape[ins:], ins, (None,) * kernel.ndim)

    @jax.jit
    def run(x, kernel, g):
        def y(x, kernel):
            operand = Operand(kernel, arithmetic, ins, kernel.ndim - ins)
            return layer.apply({"params": {"dense": {"kernel": operand}}}, x)

        out, pull = jax.vjp(y, x, kernel)
        return out, *pull(g)

    return run(jnp.asarray(x), jnp.asarray(kernel), jnp.asarray(g))


TOP = 127.5 / 64


def exact(draw, shape):
    """A matrix whose rows and columns all have TOP as the largest number: scales are powers of two."""
    rows, columns = shape
    matrix = draw.uniform(-1.9, 1.9, size=shape)
    for i in range(max(shape)):
        matrix[i % rows, i % columns] = TOP * (-1) ** i
    return matrix.astype(np.float32)


def codes(matrix, axis):
    """Integers and their scales: the largest number of a row is 127.5, the last codes are -128 and 127."""
    scale = np.abs(matrix).max(axis, keepdims=True) / np.float32(127.5)
    return np.clip(np.round(matrix / scale), -128, 127), scale


def floats(matrix, axis, dtype):
    scale = np.abs(matrix).max(axis, keepdims=True) / np.float32(ml_dtypes.finfo(dtype).max)
    return (matrix / scale).astype(dtype).astype(np.float64), scale


def test_the_product_of_integers_is_that_of_codes_with_a_scale_a_row_and_a_column(draw):
    x, w, g = (exact(draw, shape) for shape in ((6, 24), (24, 8), (6, 8)))
    y, dx, dw = product(Int8(), x, w, g)
    (a, s), (b, t) = codes(x, 1), codes(w, 0)
    np.testing.assert_array_equal(y, (a @ b) * s * t)
    c, u = codes(g * t, 1)  # a scale for each row of x
    np.testing.assert_allclose(dx, (c @ b.T) * u, rtol=1e-6)
    c, u = codes(g * s, 0)  # a scale for each column of W
    np.testing.assert_allclose(dw, (a.T @ c) * u, rtol=1e-6)


def test_the_product_of_floats_is_that_of_their_formats(draw):
    x, w, g = (draw.normal(size=shape).astype(np.float32) for shape in ((6, 24), (24, 8), (6, 8)))
    y, dx, _ = product(Float8(), x, w, g)
    (a, s), (b, t) = (floats(v, axis, ml_dtypes.float8_e4m3fn) for v, axis in ((x, 1), (w, 0)))
    np.testing.assert_allclose(y, (a @ b) * s * t, rtol=2e-5, atol=1e-5)
    c, u = floats(g * t, 1, ml_dtypes.float8_e5m2)
    np.testing.assert_allclose(dx, (c @ b.T) * u, rtol=2e-5, atol=1e-4)


@pytest.mark.parametrize("arithmetic", [Int8(gradients=None), Float8(gradients=None)])
def test_gradients_that_are_kept_are_those_of_the_float_product(arithmetic, draw):
    x, w, g = (jnp.asarray(draw.normal(size=n), jnp.float32) for n in ((6, 24), (24, 8), (6, 8)))
    y, dx, dw = product(arithmetic, x, w, g)
    assert 1e-4 < jnp.max(jnp.abs(y - x @ w)) < 0.5
    np.testing.assert_allclose(dx, g @ w.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dw, x.T @ g, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("ins", "shape"), [(1, (12, 3, 4)), (2, (3, 4, 12))])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_of_several_axes_are_their_matrices(ins, shape, dtype, draw):
    x = jnp.asarray(draw.normal(size=(2, 5, *shape[:ins])), dtype)
    kernel = jnp.asarray(draw.normal(size=shape), dtype)
    g = jnp.ones((2, 5, *shape[ins:]), dtype)
    ours = product(Int8(), x, kernel, g, ins)
    matrices = product(Int8(), x.reshape(10, 12), kernel.reshape(12, 12), g.reshape(10, 12))
    for one, matrix in zip(ours, matrices, strict=True):
        assert one.dtype == dtype
        np.testing.assert_allclose(
            one.reshape(matrix.shape).astype(jnp.float32), matrix.astype(jnp.float32), rtol=2e-2, atol=1e-2
        )


def test_what_asks_for_the_whole_kernel_gets_what_its_codes_stand_for(draw):
    kernel = exact(draw, (36, 5)).reshape(3, 3, 4, 5)  # of a convolution
    operand = Operand(jnp.asarray(kernel), Int8(), 3, 1)
    a, s = codes(kernel.reshape(36, 5), 0)
    np.testing.assert_array_equal(operand.whole(jnp.float32).reshape(36, 5), a * s)
    gradient = jax.grad(lambda k: jnp.sum(operand.replace(kernel=k).whole(jnp.float32) ** 2))
    np.testing.assert_allclose(
        gradient(jnp.asarray(kernel)), 2 * operand.whole(jnp.float32), rtol=1e-5, atol=1e-6
    )
    x = exact(draw, (2, 144)).reshape(2, 6, 6, 4)
    a, s = codes(x.reshape(2, -1), 1)
    np.testing.assert_array_equal(operand.entering(jnp.asarray(x)).reshape(2, -1), a * s)
