"""From tokens to one vector: averages, maxima, and attention with a learned query.

    attention:  h = W_o softmax((W_q z) (W_k x)^T / sqrt(d)) W_v x,  y = h + ffn(norm(h))

`z` is a learned vector. Source: multihead attention pooling, Zhai et al. 2022, "Scaling Vision
Transformers", appendix C; Lee et al. 2019, "Set Transformer", section 3.2.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax import ffn
from effjax.config import part
from effjax.layers import norms
from effjax.layers.dense import Dense, named, truncated_normal


class AttentionPool(nn.Module):
    """Attention from one learned query to all tokens, then an FFN with a residual connection.

    Attributes:
      heads: heads of the attention.
      ffn: how the channels of the pooled vector mix.
      epsilon: of the norm.
      norm: which norm, a kind in `effjax.layers.norms`.
    """

    heads: int
    ffn: nn.Module = part(ffn.KINDS)
    epsilon: float = 1e-6
    norm: norms.NormKind = "layer"

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"], train: bool = False) -> Float[Array, "b c"]:
        """Pools the tokens of each example."""
        dim = x.shape[-1]
        init = named(truncated_normal(dim**-0.5), (None, "embed"))
        query = self.param("query_token", init, (1, dim), jnp.float32).astype(x.dtype)  # [1, C]
        query = jnp.broadcast_to(query[None], (x.shape[0], 1, dim))  # [B, 1, C]
        head, axes = (self.heads, dim // self.heads), ("embed", "heads", "head_dim")
        q = Dense(head, axes, name="query")(query)  # [B, 1, H, D]
        k, v = Dense(head, axes, name="key")(x), Dense(head, axes, name="value")(x)  # [B, N, H, D]
        y = jax.nn.dot_product_attention(q, k, v)  # [B, 1, H, D]
        y = Dense(dim, ("heads", "head_dim", "embed"), inputs=2, name="output")(y)[:, 0]  # [B, C]
        return y + self.ffn(norms.norm(self.norm, self.epsilon, "ffn_norm")(y), train=train)
