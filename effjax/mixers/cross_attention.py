"""Attention from tokens to those of another sequence, such as a text.

    y_n = sum_l softmax_l(q_n k_l / sqrt(d)) v_l,    q = x W_q,   (k, v) = text (W_k, W_v)

Vaswani et al. 2017, section 3.2.3.
"""

import flax.linen as nn
from flax.linen.initializers import Initializer
from jaxtyping import Array, Bool, Float

from effjax.errors import UsageError
from effjax.layers.dense import Dense, xavier
from effjax.mixers.dot_product import softmax_attention


class CrossAttention(nn.Module):
    """Every token asks all words.

    Attributes:
      heads: attention heads.
      qkv_bias: biases of the query, key and value projections.
      output_init: initialiser of the output projection.
    """

    heads: int
    qkv_bias: bool = True
    output_init: Initializer = xavier

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n c"],
        text: Float[Array, "b l e"],
        valid: Bool[Array, "b l"] | None = None,
    ) -> Float[Array, "b n c"]:
        """Reads from the text what each token asks for.

        Args:
          x: tokens that ask.
          text: words that answer.
          valid: words that exist; a text without any is read as the mean of what stands in their place.

        Raises:
          UsageError: where the heads do not divide the channels.
        """
        channels = x.shape[-1]
        if channels % self.heads:
            raise UsageError(f"heads={self.heads} does not divide the width {channels}.")
        head, axes = (self.heads, channels // self.heads), ("embed", "heads", "head_dim")
        q = Dense(head, axes, use_bias=self.qkv_bias, name="query")(x)  # [B, N, H, D]
        k = Dense(head, axes, use_bias=self.qkv_bias, name="key")(text)  # [B, L, H, D]
        v = Dense(head, axes, use_bias=self.qkv_bias, name="value")(text)  # [B, L, H, D]
        q = nn.with_logical_constraint(q, ("batch", "length", "heads", "head_dim"))
        mask = None if valid is None else valid[:, None, None, :]
        y = softmax_attention(q, k, v, mask=mask, causal=False)  # [B, N, H, D]
        out = ("heads", "head_dim", "embed")
        return Dense(channels, out, inputs=2, kernel_init=self.output_init, name="output")(y)
