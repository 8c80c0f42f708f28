"""Attention to keys and values of a coarser map, which a strided convolution makes.

    y = softmax(q k^T / sqrt(d)) v,    q = x W_q,   k = z W_k,   v = z W_v
    z = norm(conv(x)),    squares of r x r places that do not overlap, each projected onto C channels

The cost of the attention is N^2 / r^2 for N places. Places beyond the last whole square are left out of z, as
by any convolution.

Source: spatial-reduction attention of the Pyramid Vision Transformer, Wang et al. 2021, equations 1 to 3.
"""

import flax.linen as nn
from jaxtyping import Array, Float

from effjax.errors import UsageError
from effjax.layers.dense import Dense
from effjax.layers.norms import NormKind, norm
from effjax.layers.patches import PatchEmbed
from effjax.mixers.context import Context
from effjax.mixers.dot_product import softmax_attention


class SpatialReduction(nn.Module):
    """Attention on a grid, with fewer keys than queries.

    Attributes:
      heads: attention heads.
      reduction: r, the side of the squares; 1 leaves convolution and norm out.
      qkv_bias: biases of the query, key and value projections.
      norm: of the coarser map, a kind in `effjax.layers.norms`.
      epsilon: of the norm.
    """

    heads: int
    reduction: int = 1
    qkv_bias: bool = True
    norm: NormKind = "layer"
    epsilon: float = 1e-6

    @nn.compact
    def __call__(
        self, x: Float[Array, "b height width c"], context: Context, train: bool = False
    ) -> Float[Array, "b height width c"]:
        """Mixes the places.

        Raises:
          UsageError: where the heads do not divide the channels, or the map is smaller than a square.
        """
        batch, height, width, channels = x.shape
        if channels % self.heads:
            raise UsageError(f"heads={self.heads} does not divide the width {channels}.")
        z = x
        if self.reduction > 1:
            if min(height, width) < self.reduction:
                raise UsageError(
                    f"a map of {height} x {width} is smaller than a square of reduction={self.reduction}: "
                    f"use a larger picture, or reduction={min(height, width)}."
                )
            z = PatchEmbed(self.reduction, channels, crop=True, name="reduce")(x)  # [B, H/r, W/r, C]
            z = norm(self.norm, self.epsilon, "reduced_norm", train=train)(z)
        tokens, z = x.reshape(batch, -1, channels), z.reshape(batch, -1, channels)  # [B, N, C], [B, M, C]
        head, axes = (self.heads, channels // self.heads), ("embed", "heads", "head_dim")
        q = Dense(head, axes, use_bias=self.qkv_bias, name="query")(tokens)  # [B, N, H, D]
        k = Dense(head, axes, use_bias=self.qkv_bias, name="key")(z)  # [B, M, H, D]
        v = Dense(head, axes, use_bias=self.qkv_bias, name="value")(z)  # [B, M, H, D]
        # Scaled before the product, as logits of 1e9 and more would overflow behind it.
        q = q * head[1] ** -0.5
        y = softmax_attention(q, k, v, mask=None, causal=False, scale=1.0)  # [B, N, H, D]
        y = Dense(channels, ("heads", "head_dim", "embed"), inputs=2, name="output")(y)  # [B, N, C]
        return y.reshape(x.shape)
