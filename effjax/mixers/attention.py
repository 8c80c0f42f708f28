"""Multi-head softmax attention, with what its common variants add.

    q, k, v = x W_q + b_q, x W_k + b_k, x W_v + b_v
    y = softmax(q k^T / sqrt(d) + log size + mask) v
    out = y W_o + b_o                                                    Vaswani et al. 2017, section 3.2

Grouped queries (`kv_heads < heads`): each key/value head serves `heads / kv_heads` query heads, Ainslie et
al. 2023. Rotary positions (`rotary_base`): see `effjax.mixers.rotary`. Query-key normalisation (`qk_norm`):
a norm of q and k over each head, Henry et al. 2020, or over all heads at once, as OLMo 2 has it. Sliding
window (`window`): a token sees the last `window` tokens, Beltagy et al. 2020. Capped logits (`logit_cap`):
`cap tanh(logits / cap)`, Gemma 2, 2024. Proportional attention (`Context.size`): a token that stands for s
tokens counts s times, Bolya et al. 2023. Sparse weights (`Context.share`): the largest of each head alone are
summed, Xu et al. 2024. Hard attention (`top`): a query sums over so many keys, the others have no weight,
Nagarajan et al. 2020. Unified maximum (`unified`): a token that is decoded sums over the cached keys in
parts, see `effjax.mixers.unified_softmax`.

One method computes both views of a sequence: `__call__` sees it whole, `step` sees the next tokens of it and
a cache of those before.
"""

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from effjax.config import part
from effjax.decoding.cache import Cache
from effjax.errors import UsageError, did_you_mean
from effjax.layers.dense import Dense
from effjax.layers.norms import NormKind, norm
from effjax.mixers import rotary
from effjax.mixers.cached import KeyValue
from effjax.mixers.context import Context
from effjax.mixers.dot_product import attention_weights, band, softmax_attention, weighted_sum
from effjax.mixers.stats import Stats, Watch
from effjax.mixers.unified_softmax import UnifiedSoftmax, kernel_attention, unified_attention


class Attention(KeyValue):
    """Softmax attention of every token to every token.

    Attributes:
      heads: query heads.
      kv_heads: key/value heads; None means `heads`.
      head_dim: channels of a head; None means width / heads.
      value_dim: channels of a head's values, and of what it gives; None means `head_dim`.
      qkv_bias: bias on the query, key and value projections.
      out_bias: bias on the output projection.
      qk_norm: a norm on queries and keys, before they are rotated.
      qk_norm_kind: which, a name in `effjax.layers.norms`.
      qk_norm_over: what it normalises: the channels of each `head`, all heads' channels together (`width`),
        or each head with a scale of its own (`each_head`).
      qk_norm_epsilon: of that norm.
      clip: queries, keys and values are cut to `[-clip, clip]`; None leaves them.
      rotary_base: base of the rotary frequencies; None means no rotary positions.
      rotary_scaling: how they are rescaled for long contexts, a kind in `effjax.mixers.rotary`.
      rotary_dims: channels of a head that turn, the first ones; None means all.
      rotary_pairs: which channels turn together: `(i, i + d/2)` or `(2i, 2i + 1)`.
      rotary_kept: numbers of the pairs that a head still has, of those of `rotary_dims` channels, whose
        frequencies they keep; empty means all.
      scale: factor of the logits; None means `1 / sqrt(head_dim)`.
      logit_cap: bound of the logits; None leaves them free.
      window: how many tokens back a token sees, itself included; None means all.
      top: keys of a query that count, those with the largest logits; None counts all.
      causal: whether a token sees only itself and tokens before it.
      unified: how a token that is decoded sums over the cached keys, where no cache policy asks for the
        weights; None takes the softmax of all at once.
    """

    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None
    value_dim: int | None = None
    qkv_bias: bool = True
    out_bias: bool = True
    qk_norm: bool = False
    qk_norm_kind: NormKind = "rms"
    qk_norm_over: Literal["head", "width", "each_head"] = "head"
    qk_norm_epsilon: float = 1e-6
    clip: float | None = None
    rotary_base: float | None = None
    rotary_scaling: rotary.Scaling | None = part(rotary.SCALINGS, default=None)
    rotary_dims: int | None = None
    rotary_pairs: rotary.Pairs = "halves"
    rotary_kept: tuple[int, ...] = ()
    scale: float | None = None
    logit_cap: float | None = None
    window: int | None = None
    top: int | None = None
    causal: bool = False
    unified: UnifiedSoftmax | None = None

    def __call__(
        self, x: Float[Array, "b *places c"], context: Context, train: bool = False
    ) -> Float[Array, "b *places c"]:
        """Mixes the tokens of whole sequences, or the places of whole maps, row by row."""
        y, _ = self.attend(x.reshape(x.shape[0], -1, x.shape[-1]), context, None)
        return y.reshape(x.shape)

    def observe(
        self,
        x: Float[Array, "b n c"],
        context: Context,
        needs: tuple[str, ...],
        choose: Callable[[Stats], Int[Array, "b m"] | None] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "b m c"], Stats]:
        """Mixes like `__call__`, and tells how.

        Args:
          x: whole sequences.
          context: as in `__call__`.
          needs: fields of `Stats` that shall be told.
          choose: the tokens that are mixed at all, known once the weights of all are; None takes all.
          train: whether this is training.

        Raises:
          UsageError: for something that attention does not have.
        """
        known = ("keys", "values", "attention")
        if strange := [name for name in needs if name not in known]:
            raise UsageError(f"attention knows nothing of {strange[0]!r}. {did_you_mean(strange[0], known)}")
        return self.attend(x, context, None, Watch(needs, choose))

    @nn.compact
    def attend(
        self,
        x: Float[Array, "b n c"],
        context: Context,
        cache: Cache | None,
        watch: Watch | None = None,
    ) -> tuple[Float[Array, "b m c"], Any]:
        """Attends among the tokens of `x` (no cache), or from them to the cache they are added to.

        The second thing returned is the cache, or what is watched.
        """
        positions = self.positions(x, context, cache)
        q, k, v = self.project(x, positions, context)
        if self.top is not None and self.top < 1:
            raise UsageError(f"top={self.top}: a query sums over at least one key.")
        options: dict[str, Any] = dict(scale=self.scale, cap=self.logit_cap)
        options |= dict(share=context.share, top=self.top)
        if cache is None:
            if context.size is not None:  # proportional attention: + log size of the key
                options["bias"] = jnp.log(context.size).astype(q.dtype)[:, None, None, :]  # [B, 1, 1, N]
            mask = context.mask()
            if context.window is not None:
                near = band(x.shape[1], context.window, self.causal)
                mask = near if mask is None else mask & near
            elif self.window is not None:
                options["window"] = (self.window - 1, 0 if self.causal else self.window - 1)
            options |= dict(mask=mask, causal=self.causal)
            if watch is not None:
                return self._watched(x, q, k, v, options, watch, context)
            y = softmax_attention(q, k, v, **options)  # [B, N, H, D]
        else:
            options["causal"] = False  # the mask says it, by positions
            y, cache = self.remember(
                *(q, k, v, positions, cache, context),
                lambda queries, keys, allowed, bias: attention_weights(
                    queries, keys, mask=allowed, bias=bias, **options
                ),
                self.causal,
                self.window,
                lambda queries, keys, values, allowed, bias: self.taken(
                    queries, keys, values, allowed, bias, options
                ),
            )  # [B, N, H, D]
        return self.output(y, x.shape[-1], context), cache

    @nn.nowrap
    def taken(
        self,
        q: Float[Array, "b n h d"],
        k: Float[Array, "b s g d"],
        v: Float[Array, "b s g e"],
        allowed: Bool[Array, "#b #h #n s"],
        bias: Float[Array, "b h 1 s"] | None,
        options: dict[str, Any],
    ) -> Float[Array, "b n h e"]:
        """What queries take from cached values; of a prompt all scores are there at once in any case.

        Kernels know no slots that stand for several tokens, and none that only some heads keep.
        """
        whole = options["share"] is None and options["top"] is None
        if self.unified is None or q.shape[1] > 1 or not whole:
            return softmax_attention(q, k, v, mask=allowed, bias=bias, **options)
        said: dict[str, Any] = dict(scale=self.scale, cap=self.logit_cap)
        alike = bias is None and allowed.shape[1] == 1 and q.dtype == k.dtype == v.dtype
        if self.unified.implementation != "parts" and alike:
            return kernel_attention(q, k, v, self.unified, mask=allowed, **said)
        said |= dict(splits=self.unified.splits)
        return unified_attention(q, k, v, self.unified, mask=allowed, bias=bias, **said)

    @nn.nowrap
    def _watched(
        self,
        x: Float[Array, "b n c"],
        q: Float[Array, "b n h d"],
        k: Float[Array, "b n g d"],
        v: Float[Array, "b n g e"],
        options: dict[str, Any],
        watch: Watch,
        context: Context,
    ) -> tuple[Float[Array, "b m c"], Stats]:
        """Mixes all tokens, or those that are chosen by the weights of all, and tells what is asked for."""
        weights = attention_weights(q, k, **options)  # [B, H, N, N]
        told = dict(keys=k, values=v, attention=weights)
        stats = Stats(x, **{name: told[name] for name in watch.needs})
        rows = None if watch.choose is None else watch.choose(stats)  # [B, M]
        if rows is not None:
            weights = jnp.take_along_axis(weights, rows[:, None, :, None], axis=2)  # [B, H, M, N]
        y = weighted_sum(weights.astype(v.dtype), v)  # [B, M, H, D]
        return self.output(y, x.shape[-1], context), stats

    @nn.nowrap
    def sizes(self, width: int) -> tuple[int, int]:
        """Returns how many key/value heads there are, and the channels of a head."""
        groups = self.heads if self.kv_heads is None else self.kv_heads
        if self.heads % groups:
            raise UsageError(f"kv_heads={groups} does not divide heads={self.heads}.")
        if self.head_dim is None and width % self.heads:
            raise UsageError(f"heads={self.heads} does not divide the width {width}: set head_dim.")
        size = self.head_dim or width // self.heads
        turned = size if self.rotary_dims is None else self.rotary_dims
        if self.rotary_kept:
            if self.rotary_dims is None or not all(0 <= i < self.rotary_dims // 2 for i in self.rotary_kept):
                raise UsageError(
                    f"rotary_kept={self.rotary_kept} are pairs of rotary_dims={self.rotary_dims} channels: "
                    f"give numbers from 0 to below half of them."
                )
            turned = 2 * len(self.rotary_kept)
        if self.rotary_base is not None and (turned % 2 or turned > size):
            raise UsageError(
                f"rotary positions turn pairs of channels: a head of {size} has no {turned} in pairs."
            )
        return groups, size

    @nn.nowrap
    def value_size(self) -> int | None:
        """Channels of a head's values; None where they are those of its keys."""
        return self.value_dim

    @nn.nowrap
    def rotary_table(
        self, width: int, base: float, scaling: rotary.Scaling | None, positions: Int[Array, "b n"] | None
    ) -> rotary.Table:
        """Frequencies and amplitude that turn this layer's heads."""
        dims = self.rotary_dims or self.sizes(width)[1]
        return rotary.table(base, dims, scaling, positions)

    @nn.nowrap
    def project(
        self, x: Float[Array, "b n c"], positions: Int[Array, "b n"], context: Context
    ) -> tuple[Float[Array, "b n h d"], Float[Array, "b n g d"], Float[Array, "b n g e"]]:
        """Returns queries `[B, N, H, D]`, keys `[B, N, G, D]` and values `[B, N, G, E]`."""
        groups, size = self.sizes(x.shape[-1])
        q, k, v = self.projections(x, groups, size, context)
        if self.qk_norm:
            q = self.normalise(q, "query_norm", context)
            k = self.normalise(k, "key_norm", context)
        if self.clip is not None:
            q, k, v = (jnp.clip(part, -self.clip, self.clip) for part in (q, k, v))
        turns = context.rotary
        if turns is None and self.rotary_base is not None:
            turns = self.rotary_table(x.shape[-1], self.rotary_base, self.rotary_scaling, positions)
        if turns is not None:
            frequencies, amplitude = turns
            if self.rotary_kept:
                frequencies = frequencies[jnp.asarray(self.rotary_kept)]
            q = rotary.rotate(q, positions, frequencies, amplitude, self.rotary_pairs)
            k = rotary.rotate(k, positions, frequencies, amplitude, self.rotary_pairs)
        q = nn.with_logical_constraint(q, ("batch", "length", "heads", "head_dim"))
        k = nn.with_logical_constraint(k, ("batch", "length", "kv_heads", "head_dim"))
        v = nn.with_logical_constraint(v, ("batch", "length", "kv_heads", "head_dim"))
        return q, k, v

    @nn.nowrap
    def projections(
        self, x: Float[Array, "b n c"], groups: int, size: int, context: Context
    ) -> tuple[Float[Array, "b n h d"], Float[Array, "b n g d"], Float[Array, "b n g e"]]:
        """Queries, keys and values before they are normalised and turned."""
        q_axes, kv_axes = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
        q = Dense((self.heads, size), q_axes, use_bias=self.qkv_bias, name="query")(x)  # [B, N, H, D]
        k = Dense((groups, size), kv_axes, use_bias=self.qkv_bias, name="key")(x)  # [B, N, G, D]
        v = Dense((groups, self.value_dim or size), kv_axes, use_bias=self.qkv_bias, name="value")(x)
        return q, k, v

    @nn.nowrap
    def normalise(self, x: Float[Array, "b n h d"], name: str, context: Context) -> Float[Array, "b n h d"]:
        """The norm of queries or keys."""
        reduced = 2 if self.qk_norm_over == "width" else 1
        scaled = 1 if self.qk_norm_over == "head" else 2
        return norm(self.qk_norm_kind, self.qk_norm_epsilon, name, reduced, scaled)(x)

    @nn.nowrap
    def output(self, y: Float[Array, "b n h e"], width: int, context: Context) -> Float[Array, "b n c"]:
        """Projects the heads back to the width."""
        axes = ("heads", "head_dim", "embed")
        return Dense(width, axes, inputs=2, use_bias=self.out_bias, name="output")(y)  # [B, N, C]
