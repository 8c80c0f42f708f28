"""Attention in windows, shifted by half a window in every other block.

    W-MSA    y = reverse(softmax(q k^T / sqrt(d) + B) v),   q, k, v in windows of M x M places
    SW-MSA   the same on the map rolled by floor(M / 2), where places that were apart do not see each other

The cost 4 H W C^2 + 2 M^2 H W C is linear in the number of places. A map side of at most M is one window and
is not shifted. A map that windows do not tile gets zeros below and to the right; like the reference, its
attention does not hide them.

Source: Swin Transformer, Liu et al. 2021, sections 3.2 and 3.3.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.config import part
from effjax.errors import UsageError
from effjax.layers.dense import Dense
from effjax.mixers import position_bias, windows
from effjax.mixers.context import Context
from effjax.mixers.position_bias import RelativeTable


class ShiftedWindow(nn.Module):
    """Window attention on a grid.

    Attributes:
      heads: attention heads.
      window: side M of a window.
      shifted: whether the map is rolled by half a window.
      qkv_bias: biases of the query, key and value projections.
      bias: what relative positions add to the logits, a kind in `effjax.mixers.position_bias`.
    """

    heads: int
    window: int = 7
    shifted: bool = False
    qkv_bias: bool = True
    bias: nn.Module = part(position_bias.KINDS, default=RelativeTable)

    @nn.compact
    def __call__(
        self, x: Float[Array, "b height width c"], context: Context, train: bool = False
    ) -> Float[Array, "b height width c"]:
        """Mixes the places of each window.

        Raises:
          UsageError: where the heads do not divide the channels.
        """
        (height, width), channels = x.shape[1:3], x.shape[-1]
        if channels % self.heads:
            raise UsageError(f"heads={self.heads} does not divide the width {channels}.")
        size = windows.fitted(self.window, (height, width))
        shift = windows.shift_of(size, (height, width), self.shifted)
        below, right = -height % size[0], -width % size[1]
        if below or right:
            x = jnp.pad(x, ((0, 0), (0, below), (0, right), (0, 0)))  # [B, H', W', C]
        grid = height + below, width + right
        if shift != (0, 0):
            x = jnp.roll(x, (-shift[0], -shift[1]), (1, 2))
        x = windows.partition(x, size)  # [B, w, M M, C]
        head = self.heads, channels // self.heads
        axes = "embed", "heads", "head_dim"
        q = Dense(head, axes, use_bias=self.qkv_bias, name="query")(x)  # [B, w, M M, H, D]
        k = Dense(head, axes, use_bias=self.qkv_bias, name="key")(x)  # [B, w, M M, H, D]
        v = Dense(head, axes, use_bias=self.qkv_bias, name="value")(x)  # [B, w, M M, H, D]
        bias = self.bias(size, self.window, self.heads)  # [H, M M, M M]
        allowed = windows.allowed_after_shift(grid, size, shift)  # [w, M M, M M]
        y = windows.window_attention(q, k, v, scale=head[1] ** -0.5, bias=bias, allowed=allowed)
        y = Dense(channels, ("heads", "head_dim", "embed"), inputs=2, name="output")(y)  # [B, w, M M, C]
        y = windows.reverse(y, grid, size)  # [B, H', W', C]
        if shift != (0, 0):
            y = jnp.roll(y, shift, (1, 2))
        return y[:, :height, :width]
