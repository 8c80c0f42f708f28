"""Attention in a cross: half of the heads within columns of the map, half within rows.

    y = [h_1, ..., h_K] W_o,    h_k = softmax(q k^T / sqrt(d)) v + DWConv_3x3(v)   in each stripe of head k
    stripes of heads 1 .. K/2       H x s places, side by side
    stripes of heads K/2+1 .. K     s x W places, one above the other

Two blocks reach the whole map from every place, at a cost of H W C (4 C + s H + s W). The convolution of the
values, the locally-enhanced positional encoding (LePE), is all that knows positions; it ends where a stripe
ends. Where stripes do not tile the map, zeros are added to queries, keys and values on both sides, and take
part: that is what the authors' backbone for segmentation does. Which half of the heads goes down and which
across is that of their weights.

Source: CSWin Transformer, Dong et al. 2022, sections 3.2 and 3.3.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.errors import UsageError
from effjax.layers.dense import Dense
from effjax.layers.depthwise import DepthwiseConv
from effjax.mixers import windows
from effjax.mixers.context import Context
from effjax.mixers.neighbor_kernel import Implementation, by_kernel

Map = Float[Array, "b height width h d"]


class CrossShapedWindow(nn.Module):
    """Attention in vertical and horizontal stripes.

    Attributes:
      heads: attention heads.
      stripe: width s of a stripe; None lets all heads see the whole map, as the last stage does.
      qkv_bias: biases of the query, key and value projections.
      implementation: of the attention; `plain` is what stands here, on every platform, for the others see
        `effjax.mixers.neighbor_kernel`.
    """

    heads: int
    stripe: int | None
    qkv_bias: bool = True
    implementation: Implementation = "plain"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b height width c"], context: Context, train: bool = False
    ) -> Float[Array, "b height width c"]:
        """Mixes the places of each stripe.

        Raises:
          UsageError: where the heads do not divide the channels, or cannot be halved.
        """
        (height, width), channels = x.shape[1:3], x.shape[-1]
        if channels % self.heads:
            raise UsageError(f"heads={self.heads} does not divide the width {channels}.")
        if self.stripe is not None and self.heads % 2:
            raise UsageError(f"heads={self.heads} is odd: half of them see columns and half see rows.")
        head, axes = (self.heads, channels // self.heads), ("embed", "heads", "head_dim")
        qkv = tuple(
            Dense(head, axes, use_bias=self.qkv_bias, name=name)(x) for name in ("query", "key", "value")
        )  # three of [B, H, W, heads, D]
        if self.stripe is None:
            y = self._attend(*qkv, size=(height, width), name="lepe")  # [B, H, W, C]
        else:
            half = self.heads // 2
            across, down = min(self.stripe, width), min(self.stripe, height)
            first = self._attend(*(a[..., :half, :] for a in qkv), size=(height, across), name="lepe_columns")
            second = self._attend(*(a[..., half:, :] for a in qkv), size=(down, width), name="lepe_rows")
            y = jnp.concatenate([first, second], axis=-1)  # [B, H, W, C]
        return Dense(channels, ("heads", "embed"), name="output")(y)

    @nn.nowrap
    def _attend(
        self, q: Map, k: Map, v: Map, *, size: windows.Window, name: str
    ) -> Float[Array, "b height width c"]:
        """Attention and convolved values in the stripes of these heads."""
        batch, height, width, heads, dims = q.shape
        low, high = zip(*(_edges(n, m) for n, m in zip((height, width), size, strict=True)), strict=True)
        grid = height + low[0] + high[0], width + low[1] + high[1]
        if grid != (height, width):
            edges = (0, 0), (low[0], high[0]), (low[1], high[1]), (0, 0), (0, 0)
            q, k, v = (jnp.pad(a, edges) for a in (q, k, v))
        stripes = windows.partition(v, size).reshape(-1, *size, heads * dims)  # [B stripes, m, n, C]
        local = DepthwiseConv(3, name=name)(stripes)
        local = windows.reverse(local.reshape(batch, -1, size[0] * size[1], heads * dims), grid, size)
        if self.implementation == "plain":
            q, k, v = (windows.partition(a, size) for a in (q, k, v))  # [B, stripes, places, heads, D]
            y = windows.window_attention(q, k, v, scale=dims**-0.5)  # [B, stripes, places, heads, D]
            y = windows.reverse(y, grid, size)
        else:
            how = self.implementation
            y = by_kernel(q, k, v, None, window=size, shift=(0, 0), scale=dims**-0.5, implementation=how)
        y = y.reshape(local.shape) + local  # [B, H', W', C]
        return y[:, low[0] : low[0] + height, low[1] : low[1] + width]


def _edges(side: int, stripe: int) -> tuple[int, int]:
    """Zeros before and after a side, up to a multiple of the stripe."""
    missing = -side % stripe
    return missing // 2, missing - missing // 2
