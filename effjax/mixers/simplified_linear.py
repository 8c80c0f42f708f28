"""Simplified linear attention: a ReLU in the place of the softmax, and a depthwise convolution of the values.

    phi_q = relu(x W_q + b_q),   phi_k = relu(x W_k + b_k + e)
    y_n = phi_q,n (sum_m phi_k,m^T v_m) / (phi_q,n sum_m phi_k,m^T + epsilon) + DWC(v)_n [+ LePE(v)_n]
    out = y W_o + b_o

a head at a time, with a learned code e for every place, and one depthwise kernel for the channels of a head
that all heads share. Where there are more places than channels of a head, the product of keys and values
comes first, and the cost is linear in the number of places; else the matrix of all pairs is cheaper. Weights
of a query sum to one, or to zero where its features meet none: epsilon keeps that finite. In a CSWin
Transformer that network's own convolution of the values, LePE, stays.

Source: SLAB, Guo et al. 2024, equations 7 and 8; the code of places, the shared kernel and epsilon from the
published code.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.errors import UsageError
from effjax.layers.dense import Dense, named, truncated_normal, zeros
from effjax.layers.depthwise import DepthwiseConv, depthwise_conv
from effjax.mixers.context import Context


class SimplifiedLinear(nn.Module):
    """Linear attention over all places of a map, or over tokens whose grid the context knows.

    Attributes:
      heads: attention heads.
      kernel: side of the depthwise kernel.
      qkv_bias: biases of the query, key and value projections.
      epsilon: added to the sum of the weights.
      lepe: whether a second depthwise convolution, 3 x 3 and with a kernel for every channel, is added.
    """

    heads: int
    kernel: int = 5
    qkv_bias: bool = True
    epsilon: float = 1e-6
    lepe: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "b *places c"], context: Context, train: bool = False
    ) -> Float[Array, "b *places c"]:
        """Mixes the places.

        Raises:
          UsageError: where the heads do not divide the channels, where tokens come without a grid, and for a
            map of another size than the code of places was made for.
        """
        shape, channels = x.shape, x.shape[-1]
        if channels % self.heads:
            raise UsageError(f"heads={self.heads} does not divide the width {channels}.")
        grid = shape[1:3] if x.ndim == 4 else context.grid
        if grid is None or math.prod(grid) != math.prod(shape[1:-1]):
            raise UsageError(
                f"{math.prod(shape[1:-1])} tokens are no grid of {grid}: a map alone is mixed here."
            )
        x = x.reshape(shape[0], -1, channels)  # [B, N, C]
        head = self.heads, channels // self.heads
        axes = "embed", "heads", "head_dim"
        q = Dense(head, axes, use_bias=self.qkv_bias, name="query")(x)  # [B, N, H, D]
        k = Dense(head, axes, use_bias=self.qkv_bias, name="key")(x)  # [B, N, H, D]
        v = Dense(head, axes, use_bias=self.qkv_bias, name="value")(x)  # [B, N, H, D]
        k = k + self._places(k.shape[1:]).astype(k.dtype)[None]
        y = linear_attention(jax.nn.relu(q), jax.nn.relu(k), v, self.epsilon)  # [B, N, H, D]
        values = v.reshape(shape[0], *grid, channels)  # [B, H', W', C]
        y = y + self._local(values).reshape(v.shape)
        if self.lepe:
            y = y + DepthwiseConv(3, name="lepe")(values).reshape(v.shape)
        y = Dense(channels, ("heads", "head_dim", "embed"), inputs=2, name="output")(y)  # [B, N, C]
        return y.reshape(shape)

    @nn.nowrap
    def _places(self, shape: tuple[int, ...]) -> Float[Array, "n h d"]:
        """What is added to the keys of each place."""
        if self.has_variable("params", "places"):
            held: int = self.get_variable("params", "places").shape[0]
            if held != shape[0]:
                raise UsageError(
                    f"the code of places holds {held} and this map has {shape[0]}: resize the picture."
                )
        return self.param("places", named(zeros, ("length_table", "heads", "head_dim")), shape, jnp.float32)

    @nn.nowrap
    def _local(self, v: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """The depthwise convolution of the values."""
        size = v.shape[-1] // self.heads
        init = named(truncated_normal(1 / self.kernel), (None, None, None))
        kernel = self.param("local_kernel", init, (self.kernel, self.kernel, size), jnp.float32)
        bias = self.param("local_bias", named(zeros, (None,)), (size,), jnp.float32)
        y = depthwise_conv(v, jnp.tile(kernel, (1, 1, self.heads)).astype(v.dtype))  # [B, H, W, C]
        return y + jnp.tile(bias, self.heads).astype(y.dtype)[None, None, None]


def linear_attention(
    q: Float[Array, "b n h d"], k: Float[Array, "b m h d"], v: Float[Array, "b m h d"], epsilon: float
) -> Float[Array, "b n h d"]:
    """The values weighed by products of non-negative features, in float32 and in the cheaper order."""
    wide = jnp.promote_types(v.dtype, jnp.float32)
    dtype, (n, d), m = v.dtype, (q.shape[1], q.shape[3]), k.shape[1]
    q, k, v = (part.astype(wide) for part in (q, k, v))
    total = jnp.einsum("bnhd,bhd->bnh", q, k.sum(axis=1)) + epsilon  # [B, N, H]
    if n * m > d * (n + m):
        y = jnp.einsum("bnhd,bhde->bnhe", q, jnp.einsum("bmhd,bmhe->bhde", k, v))  # [B, N, H, D]
    else:
        y = jnp.einsum("bhnm,bmhd->bnhd", jnp.einsum("bnhd,bmhd->bhnm", q, k), v)
    return (y / total[..., None]).astype(dtype)
