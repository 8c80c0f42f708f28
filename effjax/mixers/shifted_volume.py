"""Attention in windows of a volume, shifted by half a window in every other layer.

    y = softmax(q k^T / sqrt(d)) v,   q, k, v of the places of one window

A window spans frames as well as places, and its size does not grow with the video, so that the cost
4 N C^2 + 2 M N C, with M places a window, is linear in the number of tokens N. A side of the volume that one
window covers is not shifted along. A volume that windows do not tile is padded, and the padding hidden.

Sources: Video Swin Transformer, Liu et al. 2022, section 3.2; as temporal Swin attention, without a bias of
positions, in LinGen, Wang et al. 2025, figure 5.
"""

import flax.linen as nn
from jaxtyping import Array, Float

from effjax.errors import UsageError
from effjax.layers.dense import Dense
from effjax.mixers import volumes, windows
from effjax.mixers.context import Context


class ShiftedVolume(nn.Module):
    """Window attention on a video.

    Attributes:
      heads: attention heads.
      window: frames, rows and columns of a window.
      shifted: whether the volume is rolled by half a window.
      qkv_bias: biases of the query, key and value projections.
    """

    heads: int
    window: tuple[int, int, int] = (8, 4, 4)
    shifted: bool = False
    qkv_bias: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b f h w c"],
        context: Context,
        train: bool = False,
        shifted: bool | None = None,
    ) -> Float[Array, "b f h w c"]:
        """Mixes the places of each window.

        Args:
          x: tokens of a video.
          context: changes nothing.
          train: changes nothing.
          shifted: in place of the attribute, where layers of one stack differ.

        Raises:
          UsageError: where the heads do not divide the channels.
        """
        grid, channels = (x.shape[1], x.shape[2], x.shape[3]), x.shape[-1]
        if channels % self.heads:
            raise UsageError(f"heads={self.heads} does not divide the width {channels}.")
        head, axes = (self.heads, channels // self.heads), ("embed", "heads", "head_dim")
        size = volumes.fitted(self.window, grid)
        shift = volumes.shift_of(size, grid, self.shifted if shifted is None else shifted)
        cut = volumes.cut(x, size, shift)  # [B, w, M, C]
        q, k, v = (
            Dense(head, axes, use_bias=self.qkv_bias, name=name)(cut) for name in ("query", "key", "value")
        )  # three of [B, w, M, H, D]
        seen = volumes.allowed(grid, size, shift)  # [w, M, M]
        y = windows.window_attention(q, k, v, scale=head[1] ** -0.5, allowed=seen)  # [B, w, M, H, D]
        y = Dense(channels, ("heads", "head_dim", "embed"), inputs=2, name="output")(y)  # [B, w, M, C]
        return volumes.laid_out(y, grid, size, shift)
