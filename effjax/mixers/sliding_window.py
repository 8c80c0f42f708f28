"""Attention along a sequence to the nearest tokens on both sides.

    y_n = sum_m p_nm v_m,    p_nm = softmax_m(q_n k_m / sqrt(d)),    |n - m| <= radius

Queries stand in tiles, each with the keys that any of them sees and a mask, so that work and memory grow with
the number of tokens: a tile of t queries has t + 2 radius keys. From a radius of the sequence's length on it
is attention to all, with the same parameters.

Source: Longformer, Beltagy et al. 2020, section 3.1.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.errors import UsageError
from effjax.layers.dense import Dense
from effjax.mixers.context import Context
from effjax.mixers.dot_product import softmax_attention

# Queries of a tile at least: smaller ones would leave a matrix unit idle.
_TILE = 16


class SlidingWindow(nn.Module):
    """Softmax attention inside a band.

    Attributes:
      heads: attention heads.
      radius: tokens seen on each side.
    """

    heads: int
    radius: int = 4

    @nn.compact
    def __call__(
        self, x: Float[Array, "b *places c"], context: Context, train: bool = False
    ) -> Float[Array, "b *places c"]:
        """Mixes the tokens of whole sequences, or the places of whole maps, row by row.

        Raises:
          UsageError: where the heads do not divide the channels, and for packed or padded sequences.
        """
        width = x.shape[-1]
        if width % self.heads:
            raise UsageError(f"heads={self.heads} does not divide the width {width}.")
        if not (context.segments is context.valid is None):
            raise UsageError("a sliding window mixes whole sequences: give no segments and no padding.")
        shape, x = x.shape, x.reshape(x.shape[0], -1, width)  # [B, N, C]
        head, axes = (self.heads, width // self.heads), ("embed", "heads", "head_dim")
        q, k, v = (Dense(head, axes, name=name)(x) for name in ("query", "key", "value"))  # [B, N, H, D]
        y = banded_attention(q, k, v, self.radius)  # [B, N, H, D]
        y = Dense(width, ("heads", "head_dim", "embed"), inputs=2, name="output")(y)  # [B, N, C]
        return y.reshape(shape)


def banded_attention(
    q: Float[Array, "b n h d"], k: Float[Array, "b n h d"], v: Float[Array, "b n h d"], radius: int
) -> Float[Array, "b n h d"]:
    """Softmax attention of each query to the keys at most `radius` places away."""
    b, n, h, d = q.shape
    tile = max(_TILE, radius)
    if tile + 2 * radius >= n:
        return softmax_attention(q, k, v, mask=None, causal=False, window=(radius, radius))
    tiles = -(-n // tile)
    missing = tiles * tile - n
    q = jnp.pad(q, ((0, 0), (0, missing), (0, 0), (0, 0))).reshape(b * tiles, tile, h, d)
    room = (0, 0), (radius, radius + missing), (0, 0), (0, 0)
    span = tile + 2 * radius
    starts = range(0, tiles * tile, tile)

    def seen(x: Float[Array, "b n h d"]) -> Float[Array, "tiled span h d"]:
        padded = jnp.pad(x, room)
        return jnp.stack([padded[:, at : at + span] for at in starts], 1).reshape(b * tiles, span, h, d)

    place = jnp.arange(tiles)[:, None] * tile + jnp.arange(span)[None] - radius  # [tiles, span]
    away = jnp.arange(span)[None] - radius - jnp.arange(tile)[:, None]  # key - query, [tile, span]
    near, exists = jnp.abs(away) <= radius, (place >= 0) & (place < n)
    # A query that only fills the last tile may see anything: it is cut off.
    beyond = (jnp.arange(tiles)[:, None] * tile + jnp.arange(tile)[None] >= n)[:, :, None]
    mask = (near[None] & exists[:, None]) | beyond  # [tiles, tile, span]
    mask = jnp.broadcast_to(mask[None], (b, *mask.shape)).reshape(b * tiles, 1, tile, span)
    y = softmax_attention(q, seen(k), seen(v), mask=mask, causal=False)  # [B tiles, tile, H, D]
    return y.reshape(b, tiles * tile, h, d)[:, :n]
