"""Linear projections whose every axis has a logical name.

    y[..., o] = sum_i x[..., i] W[i, o] + b[o]

The names (`embed`, `heads`, `mlp`, ...) say what an axis is; `effjax.parallel` maps them to mesh axes.
Parameters are float32 at rest; the training step casts them, and a projection computes in the dtype that
parameters and input promote to.
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.initializers import Initializer
from jaxtyping import Array, Float

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
    """

    features: int | tuple[int, ...]
    axes: tuple[str | None, ...]
    inputs: int = 1
    use_bias: bool = True
    kernel_init: Initializer = xavier
    bias_init: Initializer = zeros

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Maps `[..., *inputs]` to `[..., *features]`."""
        outs = (self.features,) if isinstance(self.features, int) else tuple(self.features)
        ins = x.shape[x.ndim - self.inputs :]
        kernel = self.param("kernel", named(_flattened(self.kernel_init, ins, outs), self.axes))
        contracted = tuple(range(x.ndim - self.inputs, x.ndim)), tuple(range(self.inputs))
        x, kernel = nn.dtypes.promote_dtype(x, kernel)
        y = jax.lax.dot_general(x, kernel, (contracted, ((), ())))  # [..., *features]
        if self.use_bias:
            bias = self.param("bias", named(self.bias_init, self.axes[self.inputs :]), outs, jnp.float32)
            y = y + bias.astype(y.dtype).reshape((1,) * (y.ndim - len(outs)) + outs)
        return y


def _flattened(init: Initializer, ins: tuple[int, ...], outs: tuple[int, ...]) -> Any:
    """Initialises the matrix `[prod(ins), prod(outs)]` and gives it its shape."""

    def kernel(key: Array) -> Array:
        return init(key, (math.prod(ins), math.prod(outs)), jnp.float32).reshape(ins + outs)

    return kernel
