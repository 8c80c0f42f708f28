"""One attention over all tokens, with query, key, value and output weights for each modality.

    q_i, k_i, v_i = W_q^m x_i, W_k^m x_i, W_v^m x_i,    m = m(i)
    y_i = W_o^m attention(q, k, v)_i

Liang et al., "Mixture-of-Transformers", 2024, arXiv:2411.04996, algorithm 1.
"""

from typing import Literal

import flax.linen as nn
from jaxtyping import Array, Float

from effjax.errors import UsageError
from effjax.layers.modal import ModalDense, Modalities, ModalNorm
from effjax.mixers.attention import Attention
from effjax.mixers.context import Context


class ModalAttention(Attention):
    """`Attention` whose weights are those of a token's modality; it has no biases.

    Attributes:
      modalities: how many.
    """

    qkv_bias: bool = False
    out_bias: bool = False
    modalities: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.qkv_bias or self.out_bias:
            raise UsageError("attention by modality has no biases: set qkv_bias and out_bias to False.")
        if self.qk_norm and (self.qk_norm_over != "head" or self.qk_norm_kind not in ("rms", "layer")):
            raise UsageError("attention by modality normalises each head alone, with rms or layer.")

    @nn.nowrap
    def projections(
        self, x: Float[Array, "b n c"], groups: int, size: int, context: Context
    ) -> tuple[Float[Array, "b n h d"], Float[Array, "b n g d"], Float[Array, "b n g e"]]:
        """Queries, keys and values before they are normalised and turned."""
        modality: Modalities = context.modality
        rows = modality.sort(x)  # [T, C]

        def read(name: str, heads: int, axis: str, size: int = size) -> Float[Array, "b n h d"]:
            axes = ("embed", axis, "head_dim")
            y = ModalDense((heads, size), self.modalities, axes, name=name)(rows, modality.sizes)
            return modality.restore(y)  # [B, N, H, D]

        return (
            read("query", self.heads, "heads"),
            read("key", groups, "kv_heads"),
            read("value", groups, "kv_heads", self.value_dim or size),
        )

    @nn.nowrap
    def normalise(self, x: Float[Array, "b n h d"], name: str, context: Context) -> Float[Array, "b n h d"]:
        """The norm of queries or keys."""
        kind: Literal["rms", "layer"] = "rms" if self.qk_norm_kind == "rms" else "layer"
        return ModalNorm(kind, self.qk_norm_epsilon, self.modalities, name=name)(x, context.modality)

    @nn.nowrap
    def output(self, y: Float[Array, "b n h d"], width: int, context: Context) -> Float[Array, "b n c"]:
        """Projects the heads back to the width."""
        modality: Modalities = context.modality
        axes = ("heads", "head_dim", "embed")
        dense = ModalDense(width, self.modalities, axes, inputs=2, name="output")
        return modality.restore(dense(modality.sort(y), modality.sizes))  # [B, N, C]
