"""Attention whose four projections are attentions to parameter tokens.

    q, k, v = P_q(x), P_k(x), P_v(x),    y = P_o(attention(q, k, v)),    P(x) = Theta(x K^T) V

Wang et al., "TokenFormer", 2024, arXiv:2410.23168, section 3.2; P is `effjax.layers.pattention`.
"""

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from effjax.errors import UsageError
from effjax.layers.pattention import Pattention, Theta
from effjax.mixers.attention import Attention
from effjax.mixers.context import Context


class TokenParameterAttention(Attention):
    """`Attention` with parameter tokens in place of matrices; it has no biases.

    Attributes:
      slots: parameter tokens of each of the query, key and value projections.
      output_slots: those of the output projection; None means `slots`.
      theta: how scores become weights, see `effjax.layers.pattention`.
      scale_slots: `tau` of the first three is the root of this; None means of `slots`.
      output_scale_slots: that of the output projection.
      value_stddev: of the value tokens at the start.
    """

    qkv_bias: bool = False
    out_bias: bool = False
    slots: int = 0
    output_slots: int | None = None
    theta: Theta = "norm_gelu"
    scale_slots: int | None = None
    output_scale_slots: int | None = None
    value_stddev: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.slots < 1:
            raise UsageError(f"slots={self.slots}: say how many parameter tokens a projection has.")
        if self.qkv_bias or self.out_bias:
            raise UsageError("token-parameter attention has no biases: set qkv_bias and out_bias to False.")

    @nn.nowrap
    def projections(
        self, x: Float[Array, "b n c"], groups: int, size: int, context: Context
    ) -> tuple[Float[Array, "b n h d"], Float[Array, "b n g d"], Float[Array, "b n g e"]]:
        """Queries, keys and values before they are normalised and turned."""

        def read(name: str, heads: int, axis: str, size: int = size) -> Float[Array, "b n h d"]:
            axes = ("embed", axis, "head_dim")
            options: dict[str, Any] = dict(
                theta=self.theta, scale_slots=self.scale_slots, value_stddev=self.value_stddev
            )
            return Pattention((heads, size), self.slots, axes, name=name, **options)(x)  # [B, N, H, D]

        return (
            read("query", self.heads, "heads"),
            read("key", groups, "kv_heads"),
            read("value", groups, "kv_heads", self.value_dim or size),
        )

    @nn.nowrap
    def output(self, y: Float[Array, "b n h d"], width: int, context: Context) -> Float[Array, "b n c"]:
        """Projects the heads back to the width."""
        options: dict[str, Any] = dict(
            theta=self.theta, scale_slots=self.output_scale_slots, value_stddev=self.value_stddev
        )
        slots, axes = self.output_slots or self.slots, ("heads", "head_dim", "embed")
        return Pattention(width, slots, axes, inputs=2, name="output", **options)(y)  # [B, N, C]
