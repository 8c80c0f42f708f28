"""Block Transformer: attention over blocks of tokens below, over the tokens of one block above.

    e_j = [E_1 x_{jB}; ...; E_1 x_{jB+B-1}]             embedder: B embeddings of D / B, one behind another
    c = norm(block_decoder(e_0, e_1, ...))              causal over blocks: c_j knows blocks 0 to j
    p_1 ... p_P = W c_j                                 P prefix tokens for block j + 1
    h = norm(token_decoder(p_1, ..., p_P, E_2 x_{(j+1)B}, ..., E_2 x_{(j+2)B-2}))         causal
    logits = h_P, ..., h_{P+B-1} W_out                  of the B tokens of block j + 1

So the cache of the lower half is B times shorter and read once in B tokens, and the upper half sees no more
than P + B - 1 places. Ho et al., "Block Transformer: Global-to-Local Language Modeling for Fast Inference",
2024, arXiv:2406.02657, section 2: the `lookup` embedder and `prefix` decoding, which the paper's main models
have.

At the edges: the token that ends a block is predicted from by the last prefix of the next one, all others by
themselves. A document's first block has no block before it: its tokens see no prefix (the published code
trains on no first block). Where rows hold several documents, blocks follow the row; in the embedding of a
block tokens of documents that end in it count as zeros, as the published code pads first blocks, blocks see
those of the document that they end with, and tokens a prefix of their own document alone.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from effjax.decoding.cache import AXES, Cache
from effjax.errors import UsageError
from effjax.layers.dense import Dense, named, truncated_normal
from effjax.layers.norms import norm
from effjax.layers.stack import Stack
from effjax.mixers.attention import Attention
from effjax.mixers.context import Context
from effjax.models.lm import DecoderBlock


@flax.struct.dataclass
class State:
    """What a Block Transformer keeps between steps. Annotated `Any`, as it also carries shapes and shardings.

    As in all caches depth is the first axis of every leaf; of what no layer owns it is 1.

    Attributes:
      blocks: the block decoder's `Cache` of all layers, a slot for each full block.
      tokens: the token decoder's, of the block that is being written: its prefix and tokens.
      held: `[1, B, block - 1]` int, tokens of the block that is being written.
      context: `[1, B, C]`, what the block decoder said of the last full block.
      count: `[1, B]` int, tokens so far.
    """

    blocks: Any
    tokens: Any
    held: Any
    context: Any
    count: Any


class BlockTransformer(nn.Module):
    """Predicts the next token at every place; called and decoded as `effjax.models.lm.LM` is.

    Attributes:
      block_decoder: the block that the lower stack repeats, over blocks of tokens.
      token_decoder: the block that the upper stack repeats, over the tokens of one.
      vocab: number of tokens.
      dim: channels.
      block_depth: layers of the lower stack.
      token_depth: layers of the upper stack.
      block_length: tokens of a block.
      prefix: prefix tokens that a block's context becomes.
      max_length: longest sequence that the model is made for; None sets no limit.
      remat: rematerialisation policy, a name in `effjax.layers.stack.REMAT`.
      unroll: layers a scan iteration.
    """

    block_decoder: DecoderBlock
    token_decoder: DecoderBlock
    vocab: int
    dim: int
    block_depth: int
    token_depth: int
    block_length: int = 4
    prefix: int = 2
    max_length: int | None = None
    remat: str = "none"
    unroll: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_length < 1 or self.prefix < 1 or self.dim % self.block_length:
            raise UsageError(
                f"block_length={self.block_length} and prefix={self.prefix} must be at least 1, and the "
                f"first must divide dim={self.dim}."
            )
        for decoder in (self.block_decoder, self.token_decoder):
            if not (isinstance(decoder.mixer, Attention) and decoder.mixer.causal):
                raise UsageError(
                    "both decoders of a Block Transformer need a mixer that is causal attention."
                )

    def setup(self) -> None:
        """Tables, two stacks, and what stands between them."""
        init = named(truncated_normal(0.02), ("vocab", "embed"))
        self.embedder = self.param("embedder", init, (self.vocab, self.dim // self.block_length), jnp.float32)
        self.embedding = self.param("embedding", init, (self.vocab, self.dim), jnp.float32)
        self.head = self.param("head", init, (self.vocab, self.dim), jnp.float32)
        options: dict[str, Any] = dict(remat=self.remat, unroll=self.unroll)
        self.lower = Stack(self.block_decoder, self.block_depth, **options)
        self.upper = Stack(self.token_decoder, self.token_depth, **options) if self.token_depth else None
        # Named by what they are assigned to.
        self.lower_norm = norm(self.block_decoder.norm, self.block_decoder.epsilon, None)
        self.upper_norm = norm(self.token_decoder.norm, self.token_decoder.epsilon, None)
        draw = nn.initializers.normal(self.dim**-0.5)
        self.expansion = Dense((self.prefix, self.dim), ("embed", None, "features"), kernel_init=draw)

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
          positions: not read: blocks follow the row, and positions count blocks and places in them.
          segments: number of the document each token belongs to; 0 marks padding.
          train: handed to the parts.

        Raises:
          UsageError: for rows longer than `max_length`.
        """
        n = tokens.shape[1]
        self.check_length(n)
        size, count = self.block_length, -(-n // self.block_length)
        segments = jnp.ones_like(tokens) if segments is None else segments
        framed = [jnp.pad(a, ((0, 0), (0, count * size - n))) for a in (tokens, segments)]
        blocks, owners = (a.reshape(-1, count, size) for a in framed)  # [B, K, block]
        last = owners[:, :, -1]  # the document that goes on behind the block
        x = self.embed(blocks, owners == last[:, :, None])  # [B, K, C]
        x, _ = self.lower(x, Context(segments=last), each=(None, {}), train=train)  # [B, K, C]
        x = self.lower_norm(x)

        # Block 0 follows nothing, and behind the last block stands one that is empty.
        contexts = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))  # [B, K + 1, C]
        told = jnp.pad(last, ((0, 0), (1, 0)), constant_values=-1)
        blocks, owners = (jnp.pad(a, ((0, 0), (0, 1), (0, 0))) for a in (blocks, owners))
        h = self.decode(contexts, told, blocks, owners, train)  # [B, (K + 1) block, C]
        return self.logits(h[:, 1 : n + 1])

    @nn.nowrap
    def embed(
        self, blocks: Int[Array, "b k block"], own: Bool[Array, "b k block"] | None = None
    ) -> Float[Array, "b k c"]:
        """One vector for each block; tokens that are not its own count as zeros."""
        x = jnp.take(self.embedder, blocks, axis=0)  # [B, K, block, C / block]
        if own is not None:
            x = jnp.where(own[..., None], x, 0)
        x = x.reshape(*blocks.shape[:2], self.dim)
        return nn.with_logical_constraint(x, ("batch", "length", "features"))

    @nn.nowrap
    def decode(
        self,
        contexts: Float[Array, "b k c"],
        told: Int[Array, "b k"],
        blocks: Int[Array, "b k block"],
        owners: Int[Array, "b k block"],
        train: bool,
    ) -> Float[Array, "b m c"]:
        """What the tokens of these blocks are predicted from, those in front of them included.

        Args:
          contexts: of the block before each.
          told: the document that a context belongs to; -1 where there is no block before.
          blocks: tokens; the last of each is not read.
          owners: their documents.
          train: handed to the parts.
        """
        batch, count, size = blocks.shape
        x = jnp.take(self.embedding, blocks[:, :, :-1], axis=0)  # [B, K, block - 1, C]
        x = jnp.concatenate([self.expansion(contexts).astype(x.dtype), x], axis=2)
        prefix = jnp.broadcast_to(told[:, :, None], (batch, count, self.prefix))
        segments = jnp.concatenate([prefix, owners[:, :, :-1]], axis=2)
        x, segments = (a.reshape(batch * count, *a.shape[2:]) for a in (x, segments))
        if self.upper is not None:
            x, _ = self.upper(x, Context(segments=segments), each=(None, {}), train=train)
        return x[:, self.prefix - 1 :].reshape(batch, count * size, self.dim)

    @nn.nowrap
    def logits(self, h: Float[Array, "b n c"]) -> Float[Array, "b n vocab"]:
        """Last norm and head."""
        h = self.upper_norm(h)  # [B, N, C]
        logits = jnp.einsum("bnc,vc->bnv", h, self.head, preferred_element_type=jnp.float32)  # [B, N, V]
        return nn.with_logical_constraint(logits, ("batch", "length", "vocab"))

    @nn.nowrap
    def check_length(self, tokens: int) -> None:
        """Refuses sequences that the model is not made for."""
        if self.max_length is not None and tokens > self.max_length:
            raise UsageError(
                f"a sequence of {tokens} tokens is longer than the {self.max_length} that the model is made "
                f"for (max_length): shorten it."
            )

    @nn.nowrap
    def init_cache(self, batch: int, slots: int, dtype: DTypeLike = jnp.float32) -> State:
        """Makes the empty state of sequences of up to `slots` tokens.

        Raises:
          UsageError: for more slots than `max_length`.
        """
        self.check_length(slots)

        def empty(decoder: DecoderBlock, depth: int, slots: int) -> Cache:
            cache = decoder.mixer.init_cache(batch, slots, self.dim, dtype)
            cache = dataclasses.replace(cache, written=jnp.zeros(batch, jnp.int32))
            return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (depth, *leaf.shape)), cache)

        # A step may stretch over one block that is begun and one that is not filled.
        blocks = slots // self.block_length + 2
        return State(
            blocks=empty(self.block_decoder, self.block_depth, blocks),
            tokens=empty(self.token_decoder, self.token_depth, self.prefix + self.block_length - 1),
            held=jnp.zeros((1, batch, self.block_length - 1), jnp.int32),
            context=jnp.zeros((1, batch, self.dim), dtype),
            count=jnp.zeros((1, batch), jnp.int32),
        )

    @nn.nowrap
    def cache_axes(self) -> State:
        """Names of the axes of the state; depth comes in front of them."""
        cache = dataclasses.replace(AXES, written=("batch",))
        return State(cache, cache, ("batch", "block"), ("batch", "features"), ("batch",))

    def step(
        self, tokens: Int[Array, "b n"], state: State, positions: Int[Array, "b n"] | None = None
    ) -> tuple[Float[Array, "b n vocab"], State]:
        """Returns the logits of the next `n` tokens, and the state with them added.

        A sequence's blocks begin with its first token, whatever stands beside it in the batch. One token
        costs a pass of the token decoder over one place; the block decoder runs where a block is full.

        Args:
          tokens: a prompt, or one token, that follows what is in the state.
          state: what `init_cache` made and earlier steps filled.
          positions: negative for padding, which stands in front; nothing else is read of them.
        """
        real = jnp.ones_like(tokens, bool) if positions is None else positions >= 0
        if tokens.shape[1] == 1:
            return self.write(tokens, state, real[:, 0])
        return self.read(tokens, state, jnp.sum(real, axis=1))

    @nn.nowrap
    def read(
        self, tokens: Int[Array, "b n"], state: State, new: Int[Array, " b"]
    ) -> tuple[Float[Array, "b n vocab"], State]:
        """Adds the last `new` of some tokens: all blocks that they touch at once."""
        n, size = tokens.shape[1], self.block_length
        count = -(-(n + size - 1) // size)  # blocks that so many tokens touch at most
        begun, full = state.count[0] % size, state.count[0] // size  # [B]

        # The block that was begun goes on with the new tokens.
        at = jnp.arange((count + 1) * size)[None]
        skipped = (size - 1 + n - new - begun)[:, None]
        index = jnp.where(at < begun[:, None], at, at + skipped)
        stream = jnp.concatenate([state.held[0], tokens.astype(state.held.dtype)], axis=1)
        stream = jnp.take_along_axis(stream, jnp.minimum(index, stream.shape[1] - 1), axis=1)
        blocks = stream.reshape(-1, count + 1, size)  # [B, K + 1, block]

        number = jnp.arange(count + 1)[None]  # [1, K + 1]
        done = (begun + new) // size  # [B] blocks that are full now
        x, cache = self.summarise(
            blocks[:, :-1],
            state.blocks,
            jnp.where(number < done[:, None], full[:, None] + number, -1)[:, :-1],
        )
        contexts = jnp.concatenate([state.context[0][:, None].astype(x.dtype), x], axis=1)  # [B, K + 1, C]
        told = jnp.where(full[:, None] + number > 0, 1, -1)
        h = self.decode(contexts, told, blocks, jnp.ones_like(blocks), False)  # [B, (K + 1) block, C]
        behind = jnp.maximum((begun + new - n)[:, None] + jnp.arange(n)[None] + 1, 0)
        logits = self.logits(jnp.take_along_axis(h, behind[:, :, None], axis=1))

        context = jnp.take_along_axis(contexts, done[:, None, None], axis=1)[:, 0]  # [B, C]
        held = jnp.take_along_axis(blocks, done[:, None, None], axis=1)[:, 0, :-1]  # [B, block - 1]
        _, inner = self.begin(context, full + done > 0, state.tokens)
        if size > 1:
            place = jnp.arange(size - 1)[None]
            place = jnp.where(place < ((begun + new) % size)[:, None], self.prefix + place, -1)
            _, inner = self.follow(jnp.take(self.embedding, held, axis=0), inner, place)
        context = context.astype(state.context.dtype)
        return logits, State(cache, inner, held[None], context[None], state.count + new[None])

    @nn.nowrap
    def write(
        self, token: Int[Array, "b 1"], state: State, real: Bool[Array, " b"]
    ) -> tuple[Float[Array, "b 1 vocab"], State]:
        """Adds one token, where it is `real`."""
        count = state.count[0]
        begun = count % self.block_length  # [B]
        edge = real & (begun == self.block_length - 1)  # the token fills its block

        def within(model: "BlockTransformer", inner: Cache) -> tuple[Array, Cache]:
            place = jnp.where(real & ~edge, self.prefix + begun, -1)[:, None]
            return model.follow(jnp.take(model.embedding, token, axis=0), inner, place)

        def across(model: "BlockTransformer", h: Array, inner: Cache, outer: Cache, context: Array) -> Any:
            filled = jnp.concatenate([state.held[0], token.astype(state.held.dtype)], axis=1)[:, None]
            number = jnp.where(edge, count // self.block_length, -1)[:, None]
            x, outer = model.summarise(filled, outer, number)  # [B, 1, C]
            context = jnp.where(edge[:, None], x[:, 0].astype(context.dtype), context)
            first, fresh = model.begin(context, edge, inner)
            inner = jax.tree.map(lambda new, old: jnp.where(_rows(edge, new), new, old), fresh, inner)
            return jnp.where(edge[:, None, None], first[:, -1:].astype(h.dtype), h), inner, outer, context

        h = jnp.zeros((token.shape[0], 1, self.dim), self.embedding.dtype)
        h, inner = nn.cond(jnp.all(edge), lambda model, inner: (h, inner), within, self, state.tokens)
        h, inner, outer, context = nn.cond(
            jnp.any(edge), across, lambda model, *same: same, self, h, inner, state.blocks, state.context[0]
        )
        here = (jnp.arange(self.block_length - 1)[None] == begun[:, None]) & real[:, None]
        held = jnp.where(here, token.astype(state.held.dtype), state.held[0])
        return self.logits(h), State(outer, inner, held[None], context[None], (count + real)[None])

    @nn.nowrap
    def summarise(
        self, blocks: Int[Array, "b k block"], cache: Cache, numbers: Int[Array, "b k"]
    ) -> tuple[Float[Array, "b k c"], Cache]:
        """Contexts of the next blocks by their numbers, negative where a block is not full."""
        context = Context(positions=numbers)
        x, cache = self.lower(self.embed(blocks), context, each=(cache, {}), method="step")
        return self.lower_norm(x), cache

    @nn.nowrap
    def begin(
        self, context: Float[Array, "b c"], known: Bool[Array, " b"], cache: Cache
    ) -> tuple[Float[Array, "b p c"], Cache]:
        """Begins a block: its prefix alone in the token decoder's cache, where there is a context."""
        empty = dataclasses.replace(
            cache, positions=jnp.full_like(cache.positions, -1), written=jnp.zeros_like(cache.written)
        )
        places = jnp.where(known[:, None], jnp.arange(self.prefix)[None], -1)
        return self.follow(self.expansion(context.astype(self.embedding.dtype)), empty, places)

    @nn.nowrap
    def follow(
        self, x: Float[Array, "b n c"], cache: Cache, places: Int[Array, "b n"]
    ) -> tuple[Float[Array, "b n c"], Cache]:
        """The token decoder over the next places of a block."""
        if self.upper is None:
            return x, cache
        return self.upper(x, Context(positions=places), each=(cache, {}), method="step")


def _rows(chosen: Bool[Array, " b"], like: Array) -> Bool[Array, "..."]:
    """Which sequences, in the rank of a leaf `[layers, B, ...]`."""
    return chosen.reshape(1, -1, *(1,) * (like.ndim - 2))
