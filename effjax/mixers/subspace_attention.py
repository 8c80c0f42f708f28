"""Multi-head subspace self-attention: query, key and value are one projection.

    w_k = x U_k                                        k = 1 .. K, the coordinates in a subspace
    SSA(x | U_k) = softmax(w_k w_k^T / sqrt(p)) w_k
    y = [SSA(x | U_1), .., SSA(x | U_K)] W + b

One step of gradient descent on the coding rate of the tokens in the subspaces (`effjax.measure.coding_rate`)
has the form x + y with `[U_1^T; ..; U_K^T]` in the place of W, which is learned freely in practice.

Source: White-Box Transformers via Sparse Rate Reduction, Yu et al. 2023, equations 11 and 12, and the
published code, which scales the logits.
"""

import flax.linen as nn
from jaxtyping import Array, Float

from effjax.errors import UsageError
from effjax.layers.dense import Dense
from effjax.mixers.context import Context
from effjax.mixers.dot_product import softmax_attention


class SubspaceAttention(nn.Module):
    """Attention whose queries are its keys and values.

    Attributes:
      heads: subspaces K.
      head_dim: dimension p of a subspace; None means width / heads.
    """

    heads: int
    head_dim: int | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n c"], context: Context, train: bool = False
    ) -> Float[Array, "b n c"]:
        """Mixes the tokens of whole sequences.

        Raises:
          UsageError: where the heads do not divide the width.
        """
        width = x.shape[-1]
        if self.head_dim is None and width % self.heads:
            raise UsageError(f"heads={self.heads} does not divide the width {width}: set head_dim.")
        size = self.head_dim or width // self.heads
        axes = "embed", "heads", "head_dim"
        w = Dense((self.heads, size), axes, use_bias=False, name="subspaces")(x)  # [B, N, K, p]
        w = nn.with_logical_constraint(w, ("batch", "length", "heads", "head_dim"))
        y = softmax_attention(w, w, w, mask=context.mask(), causal=False)  # [B, N, K, p]
        return Dense(width, ("heads", "head_dim", "embed"), inputs=2, name="output")(y)  # [B, N, C]
