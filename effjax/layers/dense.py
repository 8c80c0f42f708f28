"""Linear projections whose every axis has a logical name.

    y[..., o] = sum_i x[..., i] W[i, o] + b[o]

The names (`embed`, `heads`, `mlp`, ...) say what an axis is; `effjax.parallel` maps them to mesh axes.
Parameters are float32 at rest; the training step casts them, and a projection computes in the dtype that
parameters and input promote to. A kernel that is stored otherwise (`effjax.layers.stored`) multiplies by
itself, in the dtype of the input.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.initializers import Initializer
from jaxtyping import Array, Float

from effjax.layers.stored import Stored, kernel_of, parameter

xavier = nn.initializers.xavier_uniform()
zeros = nn.initializers.zeros_init()


def truncated_normal(stddev: float) -> Initializer:
    """The initialiser of ViT and DeiT: a normal cut at two of its own standard deviations."""
    return nn.initializers.truncated_normal(stddev=stddev, lower=-2.0, upper=2.0)


def named(init: Initializer, axes: Sequence[str | None]) -> Initializer:
    """Attaches logical axis names to what an initialiser makes."""
    return nn.with_logical_partitioning(init, tuple(axes))


class Dense(nn.Module):
    """A projection of the last `inputs` axes onto `features`.

    Attributes:
      features: size of the output axis, or sizes of several.
      axes: logical names of the kernel's axes, input axes first.
      inputs: how many trailing axes of the input are contracted.
      use_bias: whether to add a bias over the output axes.
      kernel_init: initialiser; fan-in and fan-out are those of the flattened matrix.
      bias_init: initialiser of the bias.
      block: where what follows amplifies rounding: inputs are summed in blocks of so many, and the blocks in
        float32. One long float32 sum on a CPU rounds several times as much. None leaves it to the backend.
    """

    features: int | tuple[int, ...]
    axes: tuple[str | None, ...]
    inputs: int = 1
    use_bias: bool = True
    kernel_init: Initializer = xavier
    bias_init: Initializer = zeros
    block: int | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Maps `[..., *inputs]` to `[..., *features]`."""
        outs = (self.features,) if isinstance(self.features, int) else tuple(self.features)
        ins = x.shape[x.ndim - self.inputs :]
        init = _flattened(self.kernel_init, ins, outs)
        kernel = parameter(self, "kernel", kernel_of(init, self.axes, self.inputs, len(outs)))
        product = functools.partial(_product, inputs=self.inputs)
        if not isinstance(kernel, Stored):
            x, kernel = nn.dtypes.promote_dtype(x, kernel)
        if isinstance(kernel, Stored):
            y = kernel.product(x)  # [..., *features]
        elif self.block and self.inputs == 1 and ins[0] % self.block == 0:
            y = _in_blocks(x, kernel, self.block)  # [..., *features]
        elif math.prod(x.shape[: -self.inputs]) == 1 and (len(outs) > 1 or x.dtype != jnp.float32):
            alone = functools.partial(_single_row, inputs=self.inputs)
            y = jax.lax.platform_dependent(x, kernel, cpu=alone, default=product)  # [..., *features]
        else:
            y = product(x, kernel)  # [..., *features]
        if self.use_bias:
            bias = self.param("bias", named(self.bias_init, self.axes[self.inputs :]), outs, jnp.float32)
            y = y + bias.astype(y.dtype).reshape((1,) * (y.ndim - len(outs)) + outs)
        return y


def _product(x: Float[Array, "..."], kernel: Float[Array, "..."], inputs: int) -> Float[Array, "..."]:
    contracted = tuple(range(x.ndim - inputs, x.ndim)), tuple(range(inputs))
    return jax.lax.dot_general(x, kernel, (contracted, ((), ())))


def _single_row(x: Float[Array, "..."], kernel: Float[Array, "..."], inputs: int) -> Float[Array, "..."]:
    """The product for a single row, in the time to read the kernel.

    XLA's loop for one row walks a kernel of several output axes by columns on a CPU: 13 ms for 2048 x 2048
    where two equal rows take 0.4. One that is not float32 it converts as a whole first, into memory that is
    new in every call: 22 ms for 2048 x 8192 in bfloat16 (jax 0.10.1), where a few rows of it at a time take
    2.5.
    """
    row = x.reshape(1, -1)  # [1, I]
    matrix = kernel.reshape(row.shape[1], -1)  # [I, O]
    if matrix.dtype == jnp.float32 or matrix.shape[0] % 8:
        y = (jnp.broadcast_to(row, (2, row.shape[1])) @ matrix)[:1]  # [1, O]
    else:
        y = _few_rows_at_a_time(row, matrix)  # [1, O]
    return y.reshape(*x.shape[: x.ndim - inputs], *kernel.shape[inputs:])


def _few_rows_at_a_time(row: Float[Array, "1 i"], matrix: Float[Array, "i o"]) -> Float[Array, "1 o"]:
    """Products and sums of 16 rows of the matrix in one loop over columns, in float32."""
    step = 16 if matrix.shape[0] % 16 == 0 else 8
    numbers = row.reshape(-1, step).astype(jnp.float32)  # [I / step, step]

    def add(y: Float[Array, " o"], at: Array) -> tuple[Float[Array, " o"], None]:
        # Tied to the counter, the matrix is not converted as a whole before the loop.
        kept, at = jax.lax.optimization_barrier((matrix, at))
        rows = jax.lax.dynamic_slice_in_dim(kept, at * step, step)  # [step, O]
        part = jnp.zeros_like(y)
        for i in range(step):
            part = part + numbers[at, i] * rows[i].astype(jnp.float32)
        return y + part, None

    y, _ = jax.lax.scan(add, jnp.zeros(matrix.shape[1], jnp.float32), jnp.arange(len(numbers)))
    return y.astype(row.dtype)[None]


def _in_blocks(x: Float[Array, "*batch i"], kernel: Float[Array, "i ..."], block: int) -> Float[Array, "..."]:
    """x W with the sum over inputs cut into blocks."""
    pieces = x.reshape(*x.shape[:-1], -1, block)  # [..., blocks, block]
    parts = kernel.reshape(-1, block, math.prod(kernel.shape[1:]))  # [blocks, block, out]
    wide = jnp.promote_types(x.dtype, jnp.float32)
    y = jnp.einsum("...ki,kio->k...o", pieces, parts, preferred_element_type=wide)
    y = jnp.sum(y, axis=0).astype(x.dtype)
    return y.reshape(*x.shape[:-1], *kernel.shape[1:])


def _flattened(init: Initializer, ins: tuple[int, ...], outs: tuple[int, ...]) -> Any:
    """Initialises the matrix `[prod(ins), prod(outs)]` and gives it its shape."""

    def kernel(key: Array) -> Array:
        return init(key, (math.prod(ins), math.prod(outs)), jnp.float32).reshape(ins + outs)

    return kernel
