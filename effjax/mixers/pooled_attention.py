"""Attention to keys and values that are averages of neighbours.

    y = softmax(q k^T / sqrt(d)) v,    q = x W_q,   k = z W_k,   v = z W_v,   z = norm(pool(x))

The cost of the attention is N^2 / r^2 for N places and pools of r^2. Neighbours are r^2 places that follow
one another row by row, not a square: so the published networks were trained. Source: E-MHSA of Next-ViT, Li
et al. 2022, equations 6 to 8, and its code.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.errors import UsageError
from effjax.layers.dense import Dense
from effjax.layers.norms import norm
from effjax.mixers.context import Context
from effjax.mixers.dot_product import softmax_attention


class PooledAttention(nn.Module):
    """Attention on a grid, with fewer keys than queries.

    Attributes:
      heads: attention heads.
      pool: r, whose square is the number of places in a pool; 1 leaves pooling and its norm out.
      epsilon: of the batch norm.
    """

    heads: int
    pool: int = 1
    epsilon: float = 1e-5

    @nn.compact
    def __call__(
        self, x: Float[Array, "b height width c"], context: Context, train: bool = False
    ) -> Float[Array, "b height width c"]:
        """Mixes the places.

        Raises:
          UsageError: where the heads do not divide the channels, or the map is smaller than a pool.
        """
        batch, height, width, channels = x.shape
        if channels % self.heads:
            raise UsageError(f"heads={self.heads} does not divide the width {channels}.")
        tokens = x.reshape(batch, height * width, channels)  # [B, N, C]
        z, size = tokens, self.pool**2
        if size > 1:
            count = z.shape[1] // size
            if not count:
                raise UsageError(
                    f"a map of {height} x {width} has fewer than the {size} places of one pool: use a larger "
                    f"picture, or pool={int((height * width) ** 0.5)}."
                )
            # What is left of a row of pools is dropped, as the reference does.
            z = jnp.mean(z[:, : count * size].reshape(batch, count, size, channels), axis=2)  # [B, N/r^2, C]
            z = norm("batch", self.epsilon, "norm", train=train)(z)
        head, axes = (self.heads, channels // self.heads), ("embed", "heads", "head_dim")
        q = Dense(head, axes, name="query")(tokens)  # [B, N, H, D]
        k, v = Dense(head, axes, name="key")(z), Dense(head, axes, name="value")(z)  # [B, N/r^2, H, D]
        # Scaled behind the product, logits of 1e9 and more overflow where XLA fuses factor and maximum.
        q = q * head[1] ** -0.5
        y = softmax_attention(q, k, v, mask=None, causal=False, scale=1.0)  # [B, N, H, D]
        y = Dense(channels, ("heads", "head_dim", "embed"), inputs=2, name="output")(y)  # [B, N, C]
        return y.reshape(x.shape)
