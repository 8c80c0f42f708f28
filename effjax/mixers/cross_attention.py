"""Attention from one sequence to another: to a text, to a few tokens that stand for many.

q, k, v = x W_q + b_q, m W_k + b_k, m W_v + b_v
y = softmax(q k^T / sqrt(d)) v W_o + b_o                             Vaswani et al. 2017, section 3.2.3
"""

import flax.linen as nn
from flax.linen.initializers import Initializer
from jaxtyping import Array, Bool, Float

from effjax.errors import UsageError
from effjax.layers.dense import Dense, xavier
from effjax.mixers.dot_product import attention_weights, softmax_attention, weighted_sum
from effjax.mixers.log_weights import log_rounded


class CrossAttention(nn.Module):
    """Every token of `x` reads the tokens of a memory.

    Attributes:
      heads: attention heads.
      output_init: of the output projection; zeros let a network start without it.
      log_bits: of the logarithmic codes of what a token of a text gets, see `effjax.mixers.log_weights`;
        None does not round.
    """

    heads: int
    output_init: Initializer = xavier
    log_bits: int | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n c"],
        memory: Float[Array, "b m e"],
        valid: Bool[Array, "b m"] | None = None,
    ) -> Float[Array, "b n c"]:
        """Reads; tokens of the memory that are not valid are not seen, and one of each must be.

        Raises:
          UsageError: where the heads do not divide the channels.
        """
        width = x.shape[-1]
        if width % self.heads:
            raise UsageError(f"heads={self.heads} does not divide the width {width}.")
        head, axes = (self.heads, width // self.heads), ("embed", "heads", "head_dim")
        q = Dense(head, axes, name="query")(x)  # [B, N, H, D]
        k = Dense(head, axes, name="key")(memory)  # [B, M, H, D]
        v = Dense(head, axes, name="value")(memory)  # [B, M, H, D]
        mask = None if valid is None else valid[:, None, None, :]  # [B, 1, 1, M]
        if self.log_bits is None:
            y = softmax_attention(q, k, v, mask=mask, causal=False)  # [B, N, H, D]
        else:
            weights = log_rounded(attention_weights(q, k, mask=mask, causal=False), self.log_bits)
            y = weighted_sum(weights.astype(v.dtype), v)  # [B, N, H, D]
        axes = ("heads", "head_dim", "embed")
        return Dense(width, axes, inputs=2, kernel_init=self.output_init, name="output")(y)  # [B, N, C]
