"""Multi-head softmax attention, with what its common variants add.

    q, k, v = x W_q + b_q, x W_k + b_k, x W_v + b_v
    y = softmax(q k^T / sqrt(d) + log size + mask) v
    out = y W_o + b_o                                                    Vaswani et al. 2017, section 3.2

Grouped queries (`kv_heads < heads`): each key/value head serves `heads / kv_heads` query heads, Ainslie et
al. 2023. Rotary positions (`rotary_base`): channels `i` and `i + d/2` of q and k turn by `position *
base^(-2i/d)`, Su et al. 2021. Query-key normalisation (`qk_norm`): RMS norm of q and k over each head,
Henry et al. 2020. Proportional attention (`Context.size`): a token that stands for s tokens counts s times,
Bolya et al. 2023.

One method computes both views of a sequence: `__call__` sees it whole, `step` sees the next tokens of it and
a cache of those before.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from effjax.decoding.cache import Cache, append, init_cache, visible
from effjax.errors import UsageError
from effjax.layers.dense import Dense
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

    def __call__(
        self, x: Float[Array, "b n c"], context: Context, train: bool = False
    ) -> Float[Array, "b n c"]:
        """Mixes the tokens of whole sequences."""
        y, _ = self.attend(x, context, None)
        return y

    def step(
        self, x: Float[Array, "b n c"], cache: Cache, context: Context
    ) -> tuple[Float[Array, "b n c"], Cache]:
        """Mixes the next `n` tokens of each sequence with those in the cache, and adds them to it.

        Args:
          x: one token or a whole prompt; the same code serves both.
          cache: what `init_cache` made and earlier steps filled.
          context: only `positions` may be given: where the new tokens stand, negative for padding. By default
            they follow what is in the cache.

        Raises:
          UsageError: for a context with more than positions, or more tokens than the cache has slots.
        """
        if not (context.segments is context.valid is context.size is None):
            raise UsageError(
                "a cached step knows its tokens by position alone: give no segments, valid or size."
            )
        return self.attend(x, context, cache)

    @nn.nowrap
    def init_cache(self, batch: int, slots: int, width: int, dtype: DTypeLike = jnp.float32) -> Cache:
        """Makes an empty cache for sequences of up to `slots` tokens of `width` channels."""
        groups, size = self.sizes(width)
        return init_cache(batch, slots, groups, size, dtype)

    @nn.compact
    def attend(
        self, x: Float[Array, "b n c"], context: Context, cache: Cache | None
    ) -> tuple[Float[Array, "b n c"], Any]:
        """Attends among the tokens of `x` (no cache), or from them to the cache they are added to."""
        positions = context.positions
        if positions is None:
            following = jnp.arange(x.shape[1]) + (0 if cache is None else cache.written)
            positions = jnp.broadcast_to(following[None], x.shape[:2])
        q, k, v = self.project(x, positions)
        if cache is None:
            bias = None  # proportional attention: + log size of the key
            if context.size is not None:
                bias = jnp.log(context.size).astype(q.dtype)[:, None, None, :]  # [B, 1, 1, N]
            mask, causal = context.mask(), self.causal
        else:
            cache = append(cache, k, v, positions)
            k, v = cache.keys.astype(q.dtype), cache.values.astype(q.dtype)  # [B, S, G, D]
            bias, mask, causal = None, visible(cache, positions, self.causal), False
        y = jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask, is_causal=causal)  # [B, N, H, D]
        return self.output(y, x.shape[-1]), cache

    @nn.nowrap
    def sizes(self, width: int) -> tuple[int, int]:
        """Returns how many key/value heads there are, and the channels of a head."""
        groups = self.heads if self.kv_heads is None else self.kv_heads
        if self.heads % groups:
            raise UsageError(f"kv_heads={groups} does not divide heads={self.heads}.")
        if self.head_dim is None and width % self.heads:
            raise UsageError(f"heads={self.heads} does not divide the width {width}: set head_dim.")
        size = self.head_dim or width // self.heads
        if self.rotary_base is not None and size % 2:
            raise UsageError(f"rotary positions turn pairs of channels: a head of {size} has an odd one.")
        return groups, size

    @nn.nowrap
    def project(
        self, x: Float[Array, "b n c"], positions: Int[Array, "b n"]
    ) -> tuple[Float[Array, "b n h d"], Float[Array, "b n g d"], Float[Array, "b n g d"]]:
        """Returns queries `[B, N, H, D]`, keys and values `[B, N, G, D]`."""
        groups, size = self.sizes(x.shape[-1])
        q_axes, kv_axes = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
        q = Dense((self.heads, size), q_axes, use_bias=self.qkv_bias, name="query")(x)  # [B, N, H, D]
        k = Dense((groups, size), kv_axes, use_bias=self.qkv_bias, name="key")(x)  # [B, N, G, D]
        v = Dense((groups, size), kv_axes, use_bias=self.qkv_bias, name="value")(x)  # [B, N, G, D]
        if self.qk_norm:
            q, k = rms_norm(name="query_norm")(q), rms_norm(name="key_norm")(k)
        if self.rotary_base is not None:
            q, k = rotate(q, positions, self.rotary_base), rotate(k, positions, self.rotary_base)
        q = nn.with_logical_constraint(q, ("batch", "length", "heads", "head_dim"))
        k = nn.with_logical_constraint(k, ("batch", "length", "kv_heads", "head_dim"))
        v = nn.with_logical_constraint(v, ("batch", "length", "kv_heads", "head_dim"))
        return q, k, v

    @nn.nowrap
    def output(self, y: Float[Array, "b n h d"], width: int) -> Float[Array, "b n c"]:
        """Projects the heads back to the width."""
        axes = ("heads", "head_dim", "embed")
        return Dense(width, axes, inputs=2, use_bias=self.out_bias, name="output")(y)  # [B, N, C]
