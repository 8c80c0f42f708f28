"""Spark attention: the first channels of a head say which keys a query needs, the others how much of them.

    s = q[:r] k[:r] / sqrt(r)
    p = softmax(s where s is among its statistical top-k, else -inf)
    y_n = sum_m p_nm softplus(q_n[r:] k_m[r:] / sqrt(d - r)) v_m

About `active` keys have a weight, the others' values and last channels need not be read. With no more keys
than that all have. The threshold that the paper subtracts from s cancels in the softmax. Parameters and cache
are those of `effjax.mixers.attention`.

The paper's text on two points could not be had: here both parts are scaled by their own width, and rotary
positions turn each part by itself, with the frequencies of its own width, so that both products know
distances alone.

Two forms of one function:

    masked      all scores, gains and values are computed; the others' weights are 0
    gathered    of a single query, as in decoding: all scores are computed, from the first r channels of every
                key; the rest of a key and its value are fetched for the keys with a weight alone, up to
                `BLOCK` of a head at once, as often as the head with the most keys needs

The number of blocks is counted at run time: no budget of keys can be exceeded. Heads fetch apart, so where
the cache has fewer slots than heads would fetch together, the masked form reads less.

You et al., "Spark Transformer: Reactivating Sparsity in FFN and Attention", NeurIPS 2025, arXiv:2506.06644,
section 2. In Gemma-2 2B: d = 256, r = 128, 256 keys.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from effjax.decoding.cache import Cache
from effjax.errors import UsageError
from effjax.layers.dense import Dense
from effjax.layers.statistical_topk import among
from effjax.mixers import rotary
from effjax.mixers.cached import KeyValue
from effjax.mixers.context import Context
from effjax.mixers.dot_product import band, both, dot_products, softmax, weighted_sum

# Keys that a head fetches at once: of 128 channels in float32, 64 kB and as much of values of these.
BLOCK = 128


class SparkAttention(KeyValue):
    """Causal attention of every token to about `active` tokens before it.

    Attributes:
      heads: query heads.
      predictor: r above, the channels of a head that choose keys.
      active: keys that a query is meant to keep.
      kv_heads: key/value heads; None means `heads`.
      head_dim: channels of a head; None means width / heads.
      rotary_base: base of the rotary frequencies; None means no rotary positions.
      window: how many tokens back a token sees, itself included; None means all.
    """

    heads: int
    predictor: int
    active: int
    kv_heads: int | None = None
    head_dim: int | None = None
    rotary_base: float | None = None
    window: int | None = None

    def __call__(
        self, x: Float[Array, "b n c"], context: Context, train: bool = False
    ) -> Float[Array, "b n c"]:
        """Mixes the tokens of whole sequences."""
        return self.attend(x, context, None)[0]

    @nn.compact
    def attend(
        self, x: Float[Array, "b n c"], context: Context, cache: Cache | None
    ) -> tuple[Float[Array, "b n c"], Any]:
        """Attends among the tokens of `x` (no cache), or from them to the cache they are added to."""
        if context.rotary is not None:
            raise UsageError("Spark attention has one rotary base for all layers: set its rotary_base.")
        positions = self.positions(x, context, cache)
        q, k, v = self.project(x, positions)
        if cache is None:
            order = jnp.arange(x.shape[1])
            allowed = both(context.mask(), (order[:, None] >= order[None, :])[None, None])
            window = self.window if context.window is None else context.window
            if window is not None:
                allowed = allowed & band(x.shape[1], jnp.asarray(window), causal=True)
            y = weighted_sum(self.weights(q, k, allowed).astype(v.dtype), v)  # [B, N, H, D]
        else:
            y, cache = self.remember(
                *(q, k, v, positions, cache, context),
                lambda queries, keys, allowed, bias: self.weights(queries, keys, allowed, bias),
                window=self.window,
                take=self.take,
            )  # [B, N, H, D]
        axes = ("heads", "head_dim", "embed")
        return Dense(x.shape[-1], axes, inputs=2, use_bias=False, name="output")(y), cache  # [B, N, C]

    @nn.nowrap
    def weights(
        self,
        q: Float[Array, "b n h d"],
        k: Float[Array, "b s g d"],
        allowed: Bool[Array, "#b #h n s"],
        bias: Float[Array, "b h 1 s"] | None = None,
    ) -> Float[Array, "b h n s"]:
        """How much of each value a query takes, in float32; the bias is added to the scores."""
        r = self.predictor
        return self.predicted(q, k, allowed, bias)[0] * gain(q[..., r:], k[..., r:])

    @nn.nowrap
    def predicted(
        self,
        q: Float[Array, "b n h d"],
        k: Float[Array, "b s g d"],
        allowed: Bool[Array, "#b #h n s"],
        bias: Float[Array, "b h 1 s"] | None,
    ) -> tuple[Float[Array, "b h n s"], Bool[Array, "b h n s"]]:
        """p above, in float32, and which keys have one, by the first channels of a head."""
        r = self.predictor
        scores = dot_products(q[..., :r], k[..., :r]) * r**-0.5  # [B, H, N, S]
        scores = scores if bias is None else scores + bias
        chosen = among(jax.lax.stop_gradient(scores), allowed, self.active)  # [B, H, N, S]
        return softmax(jnp.where(chosen, scores, -0.7 * jnp.finfo(scores.dtype).max)), chosen

    @nn.nowrap
    def take(
        self,
        queries: Float[Array, "b n h d"],
        keys: Float[Array, "b s g d"],
        values: Float[Array, "b s g e"],
        allowed: Bool[Array, "#b #h n s"],
        bias: Float[Array, "b h 1 s"] | None,
    ) -> Float[Array, "b n h e"]:
        """What queries take from values: by the gathered form where that reads less, which the shapes say."""
        if queries.shape[1] > 1 or self.active * self.heads >= keys.shape[1] * keys.shape[2]:
            return weighted_sum(self.weights(queries, keys, allowed, bias).astype(values.dtype), values)
        chosen = self.predicted(queries, keys, allowed, bias)
        return gathered(queries, keys, values, *chosen, self.predictor, self.active)

    @nn.nowrap
    def sizes(self, width: int) -> tuple[int, int]:
        """Returns how many key/value heads there are, and the channels of a head."""
        groups = self.heads if self.kv_heads is None else self.kv_heads
        size = self.head_dim or width // self.heads
        if self.heads % groups or (self.head_dim is None and width % self.heads):
            raise UsageError(
                f"heads={self.heads} must be a multiple of kv_heads={groups}, and divide the width {width} "
                f"where head_dim is not set."
            )
        parts = (self.predictor, size - self.predictor)
        if min(parts) < 1 or (self.rotary_base is not None and any(part % 2 for part in parts)):
            raise UsageError(
                f"predictor={self.predictor} of {size} channels: take some, leave some, and cut no pair that "
                f"rotary positions turn."
            )
        return groups, size

    @nn.nowrap
    def project(
        self, x: Float[Array, "b n c"], positions: Int[Array, "b n"]
    ) -> tuple[Float[Array, "b n h d"], Float[Array, "b n g d"], Float[Array, "b n g d"]]:
        """Returns queries `[B, N, H, D]`, keys and values `[B, N, G, D]`."""
        groups, size = self.sizes(x.shape[-1])
        q_axes, kv_axes = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
        q = Dense((self.heads, size), q_axes, use_bias=False, name="query")(x)  # [B, N, H, D]
        k = Dense((groups, size), kv_axes, use_bias=False, name="key")(x)  # [B, N, G, D]
        v = Dense((groups, size), kv_axes, use_bias=False, name="value")(x)  # [B, N, G, D]
        if self.rotary_base is not None:
            q, k = self.turned(q, positions), self.turned(k, positions)
        q = nn.with_logical_constraint(q, ("batch", "length", "heads", "head_dim"))
        k = nn.with_logical_constraint(k, ("batch", "length", "kv_heads", "head_dim"))
        v = nn.with_logical_constraint(v, ("batch", "length", "kv_heads", "head_dim"))
        return q, k, v

    @nn.nowrap
    def turned(self, x: Float[Array, "b n h d"], positions: Int[Array, "b n"]) -> Float[Array, "b n h d"]:
        """Rotary positions of the two parts of a head, each by itself."""
        assert self.rotary_base is not None
        parts = jnp.split(x, [self.predictor], axis=-1)
        tables = [rotary.table(self.rotary_base, part.shape[-1], None, None)[0] for part in parts]
        turned = [rotary.rotate(p, positions, t) for p, t in zip(parts, tables, strict=True)]
        return jnp.concatenate(turned, axis=-1)


def gain(q: Float[Array, "b n h d"], k: Float[Array, "b s g d"]) -> Float[Array, "b h n s"]:
    """softplus above, of the last channels of queries and keys."""
    return jax.nn.softplus(dot_products(q, k) * q.shape[-1] ** -0.5)


def gathered(
    q: Float[Array, "b 1 h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g e"],
    weights: Float[Array, "b h 1 s"],
    chosen: Bool[Array, "b h 1 s"],
    predictor: int,
    active: int,
) -> Float[Array, "b 1 h e"]:
    """What a single query takes, reading the last channels and the values of the chosen keys alone.

    Args:
      q: queries, one of each sequence.
      k: keys.
      v: values.
      weights: p above.
      chosen: which keys have one.
      predictor: channels of a head that chose them.
      active: how many a query is meant to keep.
    """
    (b, s, groups, _), h = k.shape, q.shape[2]
    block = min(BLOCK, active)
    # Behind the chosen slots stands one that no cache has.
    listed = jnp.vectorize(
        lambda row: jnp.nonzero(row, size=s + block, fill_value=s)[0], signature="(s)->(m)"
    )
    slots = listed(chosen)  # [B, H, 1, S + M]
    batch, group = jnp.arange(b)[:, None, None], (jnp.arange(h) // (h // groups))[None, None, :]

    def add(number: Int[Array, ""], y: Float[Array, "b 1 h e"]) -> Float[Array, "b 1 h e"]:
        # Tied to the counter, neither is converted as a whole before the loop; see `effjax.ffn.active`.
        keys, values, number = jax.lax.optimization_barrier((k, v, number))
        at = jax.lax.dynamic_slice_in_dim(slots, number * block, block, axis=3)  # [B, H, 1, M]
        there = jnp.minimum(at, s - 1)
        p = jnp.where(at < s, jnp.take_along_axis(weights, there, axis=3), 0)  # [B, H, 1, M]
        place = batch, there[:, :, 0].swapaxes(1, 2), group  # a slot of each head: [B, M, H]
        p = p * gain(q[..., predictor:], keys[place][..., predictor:])  # [B, H, 1, M]
        return y + weighted_sum(p.astype(v.dtype), values[place])  # [B, 1, H, E]

    blocks = (jnp.max(jnp.sum(chosen, axis=3)) + block - 1) // block
    y = jnp.zeros((b, 1, h, v.shape[3]), jnp.promote_types(v.dtype, jnp.float32))
    return jax.lax.fori_loop(0, blocks, add, y).astype(v.dtype)
