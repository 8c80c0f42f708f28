"""Attention over a small map with values wider than keys, and queries that a convolution prepares.

    y = N(relu(concat_h softmax(s q_h k_h^T + B_h) v_h) W_o),    (q, k, v) = N(x W),  q <- N(q * K)

N is a batch norm, K a depthwise kernel of 3 x 3, s = key_dim^(-1/2), and B depends on how far two places are
apart along each axis, without sign.

Source: LeViT, Graham et al. 2021, section 4.2, for the batch norms, the wide values and B; the convolved
queries are those of EfficientViT, Liu et al. 2023, section 3.1, as LSNet, Wang et al. 2025, section 3.3 uses
them in its last stage.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.compress.merge import Fold, at, unchanged
from effjax.config import part
from effjax.errors import UsageError
from effjax.layers.conv import ConvNorm
from effjax.mixers import position_bias
from effjax.mixers.context import Context
from effjax.mixers.dot_product import softmax_attention
from effjax.mixers.position_bias import DistanceTable


class ConvQueryAttention(nn.Module):
    """Global attention on a grid.

    Attributes:
      heads: attention heads; their values share the width.
      key_dim: channels of a head's queries and keys.
      side: largest side of a map, for which position biases are made.
      epsilon: of the batch norms.
      bias: what positions add to the logits, a kind in `effjax.mixers.position_bias`.
      merged: whether the batch norms are part of the projections.
    """

    heads: int
    key_dim: int = 16
    side: int = 4
    epsilon: float = 1e-5
    bias: nn.Module = part(position_bias.KINDS, default=DistanceTable)
    merged: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "b height width c"], context: Context, train: bool = False
    ) -> Float[Array, "b height width c"]:
        """Mixes all places.

        Raises:
          UsageError: where the heads do not divide the channels, or the map is larger than `side`.
        """
        batch, height, width, channels = x.shape
        if channels % self.heads:
            raise UsageError(f"heads={self.heads} does not divide the width {channels}.")
        if max(height, width) > self.side:
            raise UsageError(
                f"a map of {height} x {width} is larger than side={self.side}, for which its position biases "
                f"are made: set side={max(height, width)}."
            )
        form = dict[str, Any](epsilon=self.epsilon, merged=self.merged)
        keys = self.heads * self.key_dim
        qkv = ConvNorm(2 * keys + channels, 1, name="qkv", **form)(x, train)  # [B, H, W, 2 K + C]
        q, k, v = jnp.split(qkv, [keys, 2 * keys], axis=-1)
        q = ConvNorm(keys, 3, depthwise=True, name="query", **form)(q, train)  # [B, H, W, K]
        q, k, v = (part.reshape(batch, height * width, self.heads, -1) for part in (q, k, v))  # [B, N, h, d]
        bias = self.bias((height, width), (self.side, self.side), self.heads)[None]  # [1, h, N, N]
        y = softmax_attention(q, k, v, mask=None, causal=False, bias=bias, scale=self.key_dim**-0.5)
        y = y.reshape(x.shape)  # [B, H, W, C]
        return ConvNorm(channels, 1, initial=0.0, name="output", **form)(jax.nn.relu(y), train)

    @nn.nowrap
    def merge(self) -> tuple["ConvQueryAttention", Fold]:
        """The batch norms become part of the projections."""
        if self.merged:
            return self, unchanged
        fold = ConvNorm(epsilon=self.epsilon).merge()[1]
        return self.clone(merged=True), at(dict.fromkeys(("qkv", "query", "output"), fold))
