"""Multi-head softmax attention, with what its common variants add.

    q, k, v = x W_q + b_q, x W_k + b_k, x W_v + b_v
    y = softmax(q k^T / sqrt(d) + log size + mask) v
    out = y W_o + b_o                                                    Vaswani et al. 2017, section 3.2

Grouped queries (`kv_heads < heads`): each key/value head serves `heads / kv_heads` query heads, Ainslie et
al. 2023. Rotary positions (`rotary_base`): channels `i` and `i + d/2` of q and k turn by `position *
base^(-2i/d)`, Su et al. 2021. Query-key normalisation (`qk_norm`): RMS norm of q and k over each head,
Henry et al. 2020. Proportional attention (`Context.size`): a token that stands for s tokens counts s times,
Bolya et al. 2023.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.errors import UsageError
from effjax.layers.dense import dense
from effjax.layers.norms import rms_norm
from effjax.mixers.context import Context


def rotate(
    x: Float[Array, "b n heads d"], positions: Int[Array, "b n"], base: float
) -> Float[Array, "b n heads d"]:
    """Turns channel pairs `(i, i + d/2)` by their positions, in float32."""
    half = x.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)  # [d/2]
    angle = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)  # [B, N, 1, d/2]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Attention(nn.Module):
    """Softmax attention of every token to every token.

    Attributes:
      heads: query heads.
      kv_heads: key/value heads; None means `heads`.
      head_dim: channels of a head; None means width / heads.
      qkv_bias: bias on the query, key and value projections.
      out_bias: bias on the output projection.
      qk_norm: RMS norm on queries and keys.
      rotary_base: base of the rotary frequencies; None means no rotary positions.
      causal: whether a token sees only itself and tokens before it.
    """

    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None
    qkv_bias: bool = True
    out_bias: bool = True
    qk_norm: bool = False
    rotary_base: float | None = None
    causal: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n c"], context: Context, train: bool = False
    ) -> Float[Array, "b n c"]:
        """Mixes the tokens of each sequence."""
        q, k, v = self.project(x, context.positions)
        bias = None  # proportional attention: + log size of the key
        if context.size is not None:
            bias = jnp.log(context.size).astype(q.dtype)[:, None, None, :]  # [B, 1, 1, N]
        y = jax.nn.dot_product_attention(
            q, k, v, bias=bias, mask=context.mask(), is_causal=self.causal
        )  # [B, N, H, D]
        return self.output(y, x.shape[-1])

    @nn.nowrap
    def project(
        self, x: Float[Array, "b n c"], positions: Int[Array, "b n"] | None
    ) -> tuple[Float[Array, "b n h d"], Float[Array, "b n g d"], Float[Array, "b n g d"]]:
        """Returns queries `[B, N, H, D]`, keys and values `[B, N, G, D]`."""
        width = x.shape[-1]
        groups = self.heads if self.kv_heads is None else self.kv_heads
        if self.heads % groups:
            raise UsageError(f"kv_heads={groups} does not divide heads={self.heads}.")
        if self.head_dim is None and width % self.heads:
            raise UsageError(f"heads={self.heads} does not divide the width {width}: set head_dim.")
        size = self.head_dim or width // self.heads

        q_axes, kv_axes = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
        q = dense((self.heads, size), q_axes, use_bias=self.qkv_bias, name="query")(x)  # [B, N, H, D]
        k = dense((groups, size), kv_axes, use_bias=self.qkv_bias, name="key")(x)  # [B, N, G, D]
        v = dense((groups, size), kv_axes, use_bias=self.qkv_bias, name="value")(x)  # [B, N, G, D]
        if self.qk_norm:
            q, k = rms_norm(name="query_norm")(q), rms_norm(name="key_norm")(k)
        if self.rotary_base is not None:
            if positions is None:
                positions = jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2])
            q, k = rotate(q, positions, self.rotary_base), rotate(k, positions, self.rotary_base)
        q = nn.with_logical_constraint(q, ("batch", "length", "heads", "head_dim"))
        k = nn.with_logical_constraint(k, ("batch", "length", "kv_heads", "head_dim"))
        v = nn.with_logical_constraint(v, ("batch", "length", "kv_heads", "head_dim"))
        return q, k, v

    @nn.nowrap
    def output(self, y: Float[Array, "b n h d"], width: int) -> Float[Array, "b n c"]:
        """Projects the heads back to the width."""
        axes = ("heads", "head_dim", "embed")
        return dense(width, axes, inputs=2, use_bias=self.out_bias, name="output")(y)  # [B, N, C]
