"""Attention at a low resolution with few channels, between two convolutions.

    z = norm(D x)                                  depthwise of k x k places, stride s
    a = softmax(q k^T / sqrt(d)) v,                q, k, v = z W_q, z W_k, z W_v: h heads of d channels
    y = U a                                        transposed convolution, stride s

For N places and C channels, of which heads keep h d = C / c, the attention costs 2 (N / s^2)^2 C / c: it
falls with the fourth power of the stride and with the compression. `upsampling="dense"` folds the output
projection into the transposed convolution, as every published size does; `"depthwise"` projects first, as the
paper's figure has it.

Source: Nottebaum et al. 2025, "LowFormer: Hardware Efficient Design for Convolutional Transformer Backbones",
section 4.2 and figure 4; heads and kernels as in its code.
"""

from typing import Any, Literal

import flax.linen as nn
from jaxtyping import Array, Float

from effjax.layers.conv import ConvNorm
from effjax.layers.dense import Dense
from effjax.layers.transposed import ConvTransposed
from effjax.mixers.context import Context
from effjax.mixers.dot_product import softmax_attention


class Lowtention(nn.Module):
    """Lowtention on a grid.

    Attributes:
      heads: attention heads.
      head_dim: channels of a head.
      stride: how much coarser the map of the attention is.
      kernel: side of the depthwise convolution before it.
      upsampling: the transposed convolution behind it.
      epsilon: of the batch norm.
    """

    heads: int
    head_dim: int
    stride: int = 2
    kernel: int = 5
    upsampling: Literal["dense", "depthwise"] = "dense"
    epsilon: float = 1e-5

    @nn.compact
    def __call__(
        self, x: Float[Array, "b height width c"], context: Context, train: bool = False
    ) -> Float[Array, "b height width c"]:
        """Mixes the places."""
        batch, height, width, channels = x.shape
        place: dict[str, Any] = dict(kernel=self.kernel, stride=self.stride)
        z = ConvNorm(**place, depthwise=True, epsilon=self.epsilon, name="down")(x, train=train)
        h, w = z.shape[1:3]  # z [B, H/s, W/s, C]
        z = z.reshape(batch, h * w, channels)
        head, axes = (self.heads, self.head_dim), ("embed", "heads", "head_dim")
        q, k, v = (Dense(head, axes, use_bias=False, name=name)(z) for name in ("query", "key", "value"))
        q = q * self.head_dim**-0.5
        y = softmax_attention(q, k, v, mask=None, causal=False, scale=1.0)  # [B, N/s^2, heads, D]
        features = None
        if self.upsampling == "depthwise":
            y = Dense(channels, ("heads", "head_dim", "embed"), inputs=2, name="output")(y)
        else:
            features = channels
        y = y.reshape(batch, h, w, -1)
        kernel, padding = (3, 1) if self.stride == 1 else (2 * self.stride, self.stride // 2)
        y = ConvTransposed(features, kernel, self.stride, padding, name="up")(y)  # [B, ~H, ~W, C]
        return y[:, :height, :width]
