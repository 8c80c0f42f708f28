"""Attention in windows, shifted by half a window in every other block.

    W-MSA    y = reverse(softmax(q k^T / sqrt(d) + B) v),   q, k, v in windows of M x M places
    SW-MSA   the same on the map rolled by floor(M / 2), where places that were apart do not see each other
    cosine   y = reverse(softmax(cos(q, k) / tau + B) v),   1 / tau = exp(min(s, log 100)), s learned a head

The cost 4 H W C^2 + 2 M^2 H W C is linear in the number of places. A map side of at most M is one window and
is not shifted. A map that windows do not tile gets zeros below and to the right; like the reference, its
attention does not hide them.

Source: Swin Transformer, Liu et al. 2021, sections 3.2 and 3.3; Swin Transformer V2, Liu et al. 2022, section
3.2 for cosine attention.
"""

import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.config import part
from effjax.errors import UsageError
from effjax.layers.dense import Dense, named
from effjax.mixers import position_bias, windows
from effjax.mixers.context import Context
from effjax.mixers.neighbor_kernel import Implementation, by_kernel
from effjax.mixers.position_bias import RelativeTable


class ShiftedWindow(nn.Module):
    """Window attention on a grid.

    Attributes:
      heads: attention heads.
      window: side M of a window, or its height and width.
      shifted: whether the map is rolled by half a window.
      qkv_bias: biases of the query, key and value projections.
      key_bias: whether the key projection has its bias among them.
      similarity: of queries and keys: `dot`, scaled by 1 / sqrt(d), or `cosine`, scaled by 1 / tau.
      bias: what relative positions add to the logits, a kind in `effjax.mixers.position_bias`; None adds
        nothing.
      pad: whether zeros are added before or after the map is rolled. Swin's own code for detection does the
        first, timm the second; the two differ at the edge, and nowhere where windows tile the map.
      head_dim: channels of a head; None means width / heads.
      implementation: of the attention; `plain` is what stands here, on every platform, for the others see
        `effjax.mixers.neighbor_kernel`.
    """

    heads: int
    window: int | tuple[int, int] = 7
    shifted: bool = False
    qkv_bias: bool = True
    key_bias: bool = True
    similarity: Literal["dot", "cosine"] = "dot"
    bias: nn.Module | None = part(position_bias.KINDS, default=RelativeTable)
    pad: Literal["before_shift", "after_shift"] = "before_shift"
    head_dim: int | None = None
    implementation: Implementation = "plain"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b height width c"], context: Context, train: bool = False
    ) -> Float[Array, "b height width c"]:
        """Mixes the places of each window.

        Raises:
          UsageError: where the heads do not divide the channels.
        """
        (height, width), channels = x.shape[1:3], x.shape[-1]
        if self.head_dim is None and channels % self.heads:
            raise UsageError(f"heads={self.heads} does not divide the width {channels}: set head_dim.")
        size = windows.fitted(self.window, (height, width))
        down, right = windows.shift_of(size, (height, width), self.shifted)
        if self.implementation != "plain":
            return self._by_kernel(x, size, (down, right))
        if self.pad == "before_shift":
            x = windows.tiled(x, size)  # [B, H', W', C]
        x = windows.tiled(windows.rolled(x, (-down, -right)), size)  # [B, H', W', C]
        y = self._attend(x, size, (down, right))  # [B, H', W', C]
        if self.pad == "after_shift":
            y = y[:, :height, :width]
        return windows.rolled(y, (down, right))[:, :height, :width]

    @nn.nowrap
    def _attend(
        self, x: Float[Array, "b height width c"], size: windows.Window, shift: windows.Window
    ) -> Float[Array, "b height width c"]:
        """Attention inside the windows of a map that was rolled by `shift`."""
        grid = x.shape[1], x.shape[2]
        q, k, v, scale, bias = self._project(windows.partition(x, size), size)  # [B, w, M M, H, D]
        allowed = windows.allowed_after_shift(grid, size, shift)  # [w, M M, M M]
        y = windows.window_attention(q, k, v, scale=scale, bias=bias, allowed=allowed)
        y = Dense(x.shape[-1], ("heads", "head_dim", "embed"), inputs=2, name="output")(y)  # [B, w, M M, C]
        return windows.reverse(y, grid, size)

    @nn.nowrap
    def _by_kernel(
        self, x: Float[Array, "b height width c"], size: windows.Window, shift: windows.Window
    ) -> Float[Array, "b height width c"]:
        """The same of a map as it is: the kernel rolls and cuts it."""
        (height, width), back = x.shape[1:3], (-shift[0], -shift[1])
        # Zeros that come after the roll are, before it, in the middle of the map.
        split = self.pad == "after_shift" and (height % size[0] or width % size[1])
        if split:
            x = windows.rolled(windows.tiled(windows.rolled(x, back), size), shift)  # [B, H', W', C]
        x = windows.tiled(x, size)  # [B, H', W', C]
        q, k, v, scale, bias = self._project(x, size)  # [B, H', W', H, D]
        if not isinstance(scale, float):
            q, scale = (q * scale.astype(jnp.float32)[None, None, None, :, None]).astype(q.dtype), 1.0
        how: Any = self.implementation
        y = by_kernel(q, k, v, bias, window=size, shift=shift, scale=scale, implementation=how)
        y = Dense(x.shape[-1], ("heads", "head_dim", "embed"), inputs=2, name="output")(y)  # [B, H', W', C]
        if split:
            y = windows.rolled(windows.rolled(y, back)[:, :height, :width], shift)
        return y[:, :height, :width]

    @nn.nowrap
    def _project(
        self, x: Float[Array, "*batch c"], size: windows.Window
    ) -> tuple[Array, Array, Array, float | Float[Array, " h"], Float[Array, "h places places"] | None]:
        """Queries, keys and values `[..., H, D]`, the factor of their products, and what is added to them."""
        head = self.heads, self.head_dim or x.shape[-1] // self.heads
        axes, key_bias = ("embed", "heads", "head_dim"), self.qkv_bias and self.key_bias
        q = Dense(head, axes, use_bias=self.qkv_bias, name="query")(x)  # [..., H, D]
        k = Dense(head, axes, use_bias=key_bias, name="key")(x)  # [..., H, D]
        v = Dense(head, axes, use_bias=self.qkv_bias, name="value")(x)  # [..., H, D]
        scale: float | Float[Array, " h"] = head[1] ** -0.5
        if self.similarity == "cosine":
            q, k, scale = unit(q), unit(k), self._inverse_temperature()
        bias = None
        if self.bias is not None:
            bias = self.bias(size, windows.sides(self.window), self.heads)  # [H, M M, M M]
        return q, k, v, scale, bias

    @nn.nowrap
    def _inverse_temperature(self) -> Float[Array, " h"]:
        """1 / tau of every head: 10 at first, at most 100."""
        init = named(nn.initializers.constant(math.log(10.0)), ("heads",))
        scale = self.param("logit_scale", init, (self.heads,), jnp.float32)
        return jnp.exp(jnp.minimum(scale.astype(jnp.float32), math.log(100.0)))


def unit(x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
    """Vectors of length one in the directions of `x`; zero stays zero."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    squared = jnp.sum(wide * wide, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(jnp.maximum(squared, 1e-24))).astype(x.dtype)
