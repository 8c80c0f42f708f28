"""Decoder-only language model.

    x_0 = E[tokens]
    x <- x + mixer(norm(x)),   x <- x + ffn(norm(x))                      depth times
    logits = norm(x_depth) W,  W = E^T where the embedding is tied

As the defaults stand this is the Llama family: `norm` is RMS norm, the mixer causal attention with rotary
positions and grouped queries, the FFN SwiGLU, and nothing has a bias: Touvron et al. 2023, section 2.2.
Grouped queries and the sizes of Llama 3: Grattafiori et al. 2024, table 3. The fields span its relatives: a
learned position table and layer norm (GPT-2), norms after the branches (OLMo 2) or on both sides of them
(Gemma 2), both branches from one input (GPT-J), no FFN at all (Mamba), layers that differ in window and
rotary positions (Gemma 3).
"""

import dataclasses
import re
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from effjax import ffn, mixers
from effjax.config import part
from effjax.decoding.policies.kinds import POLICIES
from effjax.decoding.policies.policy import Policy
from effjax.errors import UsageError
from effjax.layers.dense import named, truncated_normal, zeros
from effjax.layers.norms import NormKind, norm
from effjax.layers.stack import Layers, Stack, beside
from effjax.layers.stored import Stored, kernel_of, parameter
from effjax.mixers import rotary
from effjax.mixers.cached import KeyValue
from effjax.mixers.context import Context


@dataclasses.dataclass(frozen=True)
class Layer:
    """What may differ between layers of one stack; it travels through the scan as data.

    Attributes:
      window: how many tokens back a token sees, itself included; None means all.
      rotary_base: base of the rotary frequencies; None means that this layer turns nothing.
      rotary_scaling: how they are rescaled, a kind in `effjax.mixers.rotary`.
    """

    window: int | None = None
    rotary_base: float | None = None
    rotary_scaling: rotary.Scaling | None = part(rotary.SCALINGS, default=None)


_TABLE = kernel_of(truncated_normal(0.02), ("vocab", "embed"), 1, 1, turned=True)


class DecoderBlock(nn.Module):
    """One mixer and one FFN, each in a residual branch with its norms.

    Attributes:
      mixer: how tokens mix; its `step`, `init_cache` and `cache_axes` serve decoding. None leaves that branch
        out, of a layer among others.
      ffn: how channels mix; None means that the mixer does that too.
      epsilon: of the norms.
      norm: their kind, a name in `effjax.layers.norms`; the model's last norm is of it too, unless the model
        says otherwise.
      norm_at: whether a branch's norm stands before its layer, after it, or both.
      parallel: whether both branches read the same `x`: with a norm each (`two_norms`) or the mixer's norm
        for both (`one_norm`).
      residual_scale: factor of both branches.
    """

    mixer: Any = part(mixers.KINDS)
    ffn: nn.Module | None = part(ffn.KINDS)
    epsilon: float = 1e-5
    norm: NormKind = "rms"
    norm_at: Literal["before", "after", "both"] = "before"
    parallel: Literal["no", "one_norm", "two_norms"] = "no"
    residual_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parallel == "one_norm" and self.mixer is None:
            raise UsageError("parallel='one_norm' reads the mixer's norm: a block without one has two norms.")
        if not getattr(self.ffn, "causal", True):
            raise UsageError(
                "experts that choose tokens look at later ones, which a language model does not have yet: "
                "set ffn.choice='token'."
            )

    def __call__(
        self, x: Float[Array, "b n c"], each: Any, context: Context, train: bool = False
    ) -> tuple[Float[Array, "b n c"], None]:
        """Returns `(x, None)` for whole sequences; `each` holds this layer's window, rotary table, scale."""
        _, own = each
        x, _ = self.residual(x, None, dataclasses.replace(context, **own), train)
        return x, None

    def step(
        self, x: Float[Array, "b n c"], each: Any, context: Context, train: bool = False
    ) -> tuple[Float[Array, "b n c"], Any]:
        """Returns `(x, cache)` for the next tokens; `each` starts with this layer's cache of those before."""
        cache, own = each
        return self.residual(x, cache, dataclasses.replace(context, **own), train)

    @nn.compact
    def residual(
        self, x: Float[Array, "b n c"], cache: Any, context: Context, train: bool
    ) -> tuple[Float[Array, "b n c"], Any]:
        """Both branches; without a cache the tokens are whole sequences."""
        mixed, first = x, None
        if self.mixer is not None:
            first = self._before(x, "mixer_norm", context, train)  # [B, N, C]
            if cache is None:
                h = self.mixer(first, context, train=train)  # [B, N, C]
            else:
                h, cache = self.mixer.step(first, cache, context)  # [B, N, C]
            mixed = x + self._after(h, "mixer_norm", context, train)
        if self.ffn is None:
            return self._named(mixed), cache
        if self.parallel == "one_norm":
            h = first
        else:
            h = self._before(mixed if self.parallel == "no" else x, "ffn_norm", context, train)
        h = self.channels(h, context, train)  # [B, N, C]
        x = mixed + self._after(h, "ffn_norm", context, train)  # [B, N, C]
        return self._named(x), cache

    @nn.nowrap
    def normalised(
        self, x: Float[Array, "b n c"], name: str, context: Context, train: bool
    ) -> Float[Array, "b n c"]:
        """One of the norms of the block."""
        return norm(self.norm, self.epsilon, name, train=train)(x)

    @nn.nowrap
    def channels(self, h: Float[Array, "b n c"], context: Context, train: bool) -> Float[Array, "b n c"]:
        """The FFN."""
        assert self.ffn is not None
        own = {} if context.layer is None else {"layer": context.layer}
        return self.ffn(h, train=train, **own)

    @nn.nowrap
    def _before(
        self, x: Float[Array, "b n c"], name: str, context: Context, train: bool
    ) -> Float[Array, "b n c"]:
        if self.norm_at == "after":
            return x
        h = self.normalised(x, name, context, train)
        return h if context.norm_scale is None else h * context.norm_scale.astype(h.dtype)

    @nn.nowrap
    def _after(
        self, h: Float[Array, "b n c"], name: str, context: Context, train: bool
    ) -> Float[Array, "b n c"]:
        if self.norm_at != "before":
            h = self.normalised(h, f"{name}_after", context, train)
        return h if self.residual_scale == 1.0 else h * jnp.asarray(self.residual_scale, h.dtype)

    @nn.nowrap
    def _named(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        return nn.with_logical_constraint(x, ("batch", "length", "features"))


class LM(nn.Module):
    """Predicts the next token at every place.

    Attributes:
      block: the block that the stack repeats.
      vocab: number of tokens.
      dim: channels of a token.
      depth: number of blocks.
      tied: whether the head is the embedding table transposed (Press and Wolf 2017).
      max_length: longest sequence that the model is made for; None sets no limit, as rotary positions need
        none. A clone with another value keeps the parameters.
      remat: rematerialisation policy, a name in `effjax.layers.stack.REMAT`.
      unroll: layers a scan iteration.
      layers: kinds of layers, taken in turn: layer `i` is of kind `i mod len(layers)`. Where any of them has
        a window it replaces the mixer's in all layers, and so with rotary positions; empty means that all
        layers are as the mixer says.
      position_table: rows of a learned table that is added to the embedding; 0 means there is none.
      position_offset: row of the first position.
      embedding_scale: factor of the embedding.
      head_bias: whether the head has a bias.
      logit_scale: factor of the logits.
      logit_cap: bound of the logits, which become `cap tanh(logits / cap)`; None leaves them free.
      shared: regexps of the parameters that all blocks share, see `Stack`.
      norm_scaling: whether what the norms before the branches give is divided by the square root of the
        layer's number, counted from 1: see `effjax.compress.norm_scaling`.
      last_norm: kind of the norm before the head; None takes that of the block.
      cache: which tokens are kept while it decodes, a kind in `effjax.decoding.policies.kinds`; None keeps
        all. A clone with another one keeps the parameters.
      layer_blocks: the definition of every layer, where they differ; empty means `block` for all. Mixers that
        keep something while decoding are of one kind, and differ in sizes.
    """

    block: DecoderBlock
    vocab: int
    dim: int
    depth: int
    tied: bool = False
    max_length: int | None = None
    remat: str = "none"
    unroll: int = 1
    layers: tuple[Layer, ...] = ()
    position_table: int = 0
    position_offset: int = 0
    embedding_scale: float = 1.0
    head_bias: bool = False
    logit_scale: float = 1.0
    logit_cap: float | None = None
    shared: tuple[str, ...] = ()
    norm_scaling: bool = False
    last_norm: NormKind | None = None
    cache: Policy | None = part(POLICIES, default=None)
    layer_blocks: tuple[DecoderBlock, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm_scaling and self.block.norm_at == "after":
            raise UsageError("norm_scaling scales the norms before the branches: set norm_at to 'before'.")
        if self._pooled and not any(re.fullmatch(pattern, "ffn/values") for pattern in self.shared):
            raise UsageError("a pool is of all layers: share its tables, shared=('ffn/(inputs|values)',).")

    def __call__(
        self,
        tokens: Int[Array, "b n"],
        positions: Int[Array, "b n"] | None = None,
        segments: Int[Array, "b n"] | None = None,
        train: bool = False,
    ) -> Float[Array, "b n vocab"]:
        """Returns float32 logits of the token after each place.

        Args:
          tokens: numbers below `vocab`; a larger one gives NaN.
          positions: place of each token in its document; by default in its row.
          segments: number of the document each token belongs to, where rows hold several; tokens see only
            their own document. 0 marks padding.
          train: handed to the parts.

        Raises:
          UsageError: for rows longer than `max_length`.
        """
        self.check_length(tokens.shape[1])
        context = Context(positions=positions, segments=segments)
        logits, _ = self.forward(tokens, context, None, train)
        return logits

    def step(
        self, tokens: Int[Array, "b n"], caches: Any, positions: Int[Array, "b n"] | None = None
    ) -> tuple[Float[Array, "b n vocab"], Any]:
        """Returns the logits of the next `n` tokens, and the caches with them added.

        Args:
          tokens: a prompt, or one token, that follows what is in the caches.
          caches: what `init_cache` made and earlier steps filled.
          positions: place of each token in its sequence, negative for padding; by default the caches' slots.
        """
        return self.forward(tokens, Context(positions=positions, cache=self.cache), caches, False)

    @nn.nowrap
    def init_cache(self, batch: int, slots: int, dtype: DTypeLike = jnp.float32) -> Any:
        """Makes the empty caches of all layers, depth in front, for sequences of up to `slots` tokens.

        Where layers differ their caches stand apart, and a layer without a mixer has none.

        Raises:
          UsageError: for more slots than `max_length`, or a policy where layers keep no keys and values.
        """
        self.check_length(slots)
        if self.layer_blocks:
            mixers = [block.mixer for block in self.layer_blocks]
            made = [m and m.init_cache(batch, slots, self.dim, dtype, **self._policy()) for m in mixers]
            return beside(made)
        cache = self.block.mixer.init_cache(batch, slots, self.dim, dtype, **self._policy())
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (self.depth, *leaf.shape)), cache)

    @nn.nowrap
    def layers_apart(self, variables: Any) -> Any:
        """The same variables with the layers apart, see `effjax.layers.stack.apart`: for decoding."""
        params = variables["params"]
        return {**variables, "params": {**params, "blocks": self.stack().apart(params["blocks"])}}

    @nn.nowrap
    def stack(self, **options: Any) -> Stack:
        """The definition of its layers."""
        return Stack(self.block, self.depth, shared=self.shared, blocks=self.layer_blocks, **options)

    @nn.nowrap
    def cache_axes(self) -> Any:
        """Names of the axes of one layer's cache; depth comes in front of them."""
        return self.block.mixer.cache_axes(**self._policy())

    @nn.nowrap
    def _policy(self) -> dict[str, Policy]:
        if self.cache is None:
            return {}
        if not isinstance(self.block.mixer, KeyValue):
            raise UsageError(
                f"cache={type(self.cache).__name__} chooses among keys and values, and "
                f"{type(self.block.mixer).__name__} keeps none: leave the policy out."
            )
        return {"policy": self.cache}

    @nn.nowrap
    def check_length(self, tokens: int) -> None:
        """Refuses sequences that the model is not made for."""
        if self.max_length is not None and tokens > self.max_length:
            raise UsageError(
                f"a sequence of {tokens} tokens is longer than the {self.max_length} that the model is made "
                f"for (max_length): shorten it."
            )

    @nn.compact
    def forward(
        self, tokens: Int[Array, "b n"], context: Context, caches: Any, train: bool
    ) -> tuple[Float[Array, "b n vocab"], Any]:
        """Embedding, blocks and head; without caches the tokens are whole sequences."""
        x, table = self.embed(tokens, context, caches)  # [B, N, C]

        stack = self.stack(remat=self.remat, unroll=self.unroll, name="blocks")
        method, each = "__call__" if caches is None else "step", (caches, self.own())
        x, caches = stack(x, context, each=each, method=method, train=train)  # [B, N, C]

        kind = self.block.norm if self.last_norm is None else self.last_norm
        x = norm(kind, self.block.epsilon, "norm", train=train)(x)  # [B, N, C]
        if not self.tied:
            table = parameter(self, "head", _TABLE, (self.vocab, self.dim), jnp.float32)
        if isinstance(table, Stored):
            logits = table.product(x).astype(jnp.float32)  # [B, N, V]
        else:
            # Operands keep their dtype and the sums are float32: no float32 copy of a table of 128k rows.
            logits = jnp.einsum("bnc,vc->bnv", x, table, preferred_element_type=jnp.float32)
        if self.head_bias:
            bias = self.param("head_bias", named(zeros, ("vocab",)), (self.vocab,), jnp.float32)
            logits = logits + bias.astype(logits.dtype)[None, None, :]
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if self.logit_cap is not None:
            logits = self.logit_cap * jnp.tanh(logits / self.logit_cap)
        return nn.with_logical_constraint(logits, ("batch", "length", "vocab")), caches

    @nn.nowrap
    def embed(
        self, tokens: Int[Array, "b n"], context: Context, caches: Any
    ) -> tuple[Float[Array, "b n c"], Any]:
        """Returns what goes into the first block, and the embedding table."""
        table = parameter(self, "embedding", _TABLE, (self.vocab, self.dim), jnp.float32)
        x = table.take(tokens) if isinstance(table, Stored) else jnp.take(table, tokens, axis=0)  # [B, N, C]
        if self.embedding_scale != 1.0:
            x = x * jnp.asarray(self.embedding_scale, x.dtype)
        if self.position_table:
            init = named(truncated_normal(0.02), ("length_table", "embed"))
            rows = self.param("positions", init, (self.position_table, self.dim), jnp.float32)
            positions = context.positions
            if positions is None:
                start = 0 if caches is None else _written(caches)
                positions = jnp.broadcast_to((start + jnp.arange(tokens.shape[1]))[None], tokens.shape)
            # Padding stands at negative positions, and nobody sees it.
            at = jnp.maximum(positions, 0) + self.position_offset
            x = x + jnp.take(rows, at, axis=0).astype(x.dtype)  # [B, N, C]
        return nn.with_logical_constraint(x, ("batch", "length", "features")), table

    @nn.nowrap
    def own(self) -> dict[str, Any]:
        """What each layer has for itself, depth in front: fields of its `Context`."""
        scales = self.scales()
        own: dict[str, Any] = {} if scales is None else {"norm_scale": scales}
        if self._pooled:
            own["layer"] = jnp.arange(self.depth)  # [L]
        if not self.layers:
            return own
        kinds = [self.layers[i % len(self.layers)] for i in range(self.depth)]
        if any(kind.window is not None for kind in self.layers):
            everything = 2**30
            own["window"] = jnp.asarray([kind.window or everything for kind in kinds], jnp.int32)  # [L]
        if any(kind.rotary_base is not None for kind in self.layers):
            tables = {kind: self.rotary_table(kind) for kind in set(kinds)}
            frequencies, amplitudes = zip(*(tables[kind] for kind in kinds), strict=True)
            own["rotary"] = jnp.stack(frequencies), jnp.asarray(amplitudes, jnp.float32)  # [L, D/2], [L]
        return own

    @property
    def _pooled(self) -> bool:
        """Whether layers look into one pool of slots."""
        return bool(getattr(self.block.ffn, "pool", 0))

    @nn.nowrap
    def scales(self) -> Float[Array, " depth"] | None:
        """What the norms' outputs are multiplied by in each layer; None where they are as they come."""
        return jax.lax.rsqrt(jnp.arange(1.0, self.depth + 1)) if self.norm_scaling else None

    @nn.nowrap
    def rotary_table(self, kind: Layer) -> rotary.Table:
        """Frequencies and amplitude of one kind of layer; frequencies of 0 turn nothing."""
        base = 1.0 if kind.rotary_base is None else kind.rotary_base
        frequencies, amplitude = self.block.mixer.rotary_table(self.dim, base, kind.rotary_scaling, None)
        return (frequencies * 0.0, 1.0) if kind.rotary_base is None else (frequencies, amplitude)


def _written(caches: Any) -> Int[Array, "*b"]:
    """Tokens so far, by the first layer that has a cache."""
    if not isinstance(caches.written, Layers):
        return caches.written[0]
    written: Array = next(each for each in caches.written.each if each is not None)
    return written
