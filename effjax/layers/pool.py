"""From tokens to one vector, with parameters. Each kind is a Linen module from `[B, N, C]` to `[B, C]`.

    attention:  h = W_o softmax((W_q z) (W_k x)^T / sqrt(d)) W_v x,  y = h + ffn(norm(h))
    ggem:       y_c = (mean_n max(x_nc, epsilon)^p_g)^(1 / p_g),  c in group g

`z` is a learned vector: multihead attention pooling, Zhai et al. 2022, "Scaling Vision Transformers",
appendix C; Lee et al. 2019, "Set Transformer", section 3.2. `p_g` is a learned exponent a group of channels:
Ko et al. 2022, "Group Generalized Mean Pooling for Vision Transformer", section 3.
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax import ffn
from effjax.config import part
from effjax.errors import UsageError
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


class GroupGeneralizedMean(nn.Module):
    """The generalised mean of every channel over the tokens, with one learned exponent a group of channels.

    An exponent of 1 is the average of what is above `epsilon`, a large one the largest value; one group is
    GeM (Radenovic et al. 2019), as many as channels a GeM for each of them. Computed as a logarithm of sums
    of exponentials in float32, which does not overflow at any exponent.

    Attributes:
      groups: of neighbouring channels; as many as attention heads in the paper.
      exponent: initial value of every exponent. The paper's could not be found; 3 is that of GeM.
      epsilon: what smaller and negative values are raised to.
    """

    groups: int
    exponent: float = 3.0
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"], train: bool = False) -> Float[Array, "b c"]:
        """Pools the tokens of each example.

        Raises:
          UsageError: where the groups do not divide the channels.
        """
        channels = x.shape[-1]
        if channels % self.groups:
            raise UsageError(f"groups={self.groups} does not divide the width {channels}.")
        init = named(nn.initializers.constant(self.exponent), (None,))
        p = self.param("exponent", init, (self.groups,), jnp.float32)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        p = jnp.repeat(p.astype(wide), channels // self.groups)[None]  # [1, C]
        logs = jnp.log(jnp.maximum(x.astype(wide), self.epsilon))  # [B, N, C]
        total = jax.nn.logsumexp(p[:, None] * logs, axis=1)  # [B, C]
        return jnp.exp((total - jnp.log(x.shape[1])) / p).astype(x.dtype)


Plain = Literal["mean", "max"]

KINDS = {"attention": AttentionPool, "ggem": GroupGeneralizedMean}


def pooled(
    pool: str | nn.Module, x: Float[Array, "b n c"], train: bool, owner: nn.Module
) -> Float[Array, "b c"]:
    """The mean or largest value of the tokens, or what a pool with parameters makes of them.

    Args:
      pool: `mean` or `max`, or one of `KINDS`.
      x: tokens.
      train: handed to the pool.
      owner: among whose parameters the pool's stand, as `attention_pool`, `ggem_pool`.
    """
    if isinstance(pool, nn.Module):
        kind = next(kind for kind, made in KINDS.items() if isinstance(pool, made))
        return pool.copy(parent=owner, name=f"{kind}_pool")(x, train=train)
    return jnp.mean(x, axis=1) if pool == "mean" else jnp.max(x, axis=1)
