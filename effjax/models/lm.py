"""Decoder-only language model of the Llama family.

    x_0 = E[tokens]
    x <- x + mixer(norm(x)),   x <- x + ffn(norm(x))                      depth times
    logits = norm(x_depth) W,  W = E^T where the embedding is tied

`norm` is RMS norm, the mixer causal attention with rotary positions and grouped queries, the FFN SwiGLU, and
nothing has a bias: Touvron et al. 2023, section 2.2. Grouped queries and the sizes of Llama 3: Grattafiori et
al. 2024, table 3.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from effjax import ffn, mixers
from effjax.config import part
from effjax.errors import UsageError
from effjax.layers.dense import named, truncated_normal
from effjax.layers.norms import rms_norm
from effjax.layers.stack import Stack
from effjax.mixers.context import Context


class DecoderBlock(nn.Module):
    """One mixer and one FFN, each behind an RMS norm and a residual connection.

    Attributes:
      mixer: how tokens mix; its `step` and `init_cache` serve decoding.
      ffn: how channels mix.
      epsilon: of both RMS norms.
    """

    mixer: nn.Module = part(mixers.KINDS)
    ffn: nn.Module = part(ffn.KINDS)
    epsilon: float = 1e-5

    def __call__(
        self, x: Float[Array, "b n c"], each: None, context: Context, train: bool = False
    ) -> tuple[Float[Array, "b n c"], None]:
        """Returns `(x, None)` for whole sequences; layers have no input of their own."""
        x, _ = self.residual(x, None, context, train)
        return x, None

    def step(
        self, x: Float[Array, "b n c"], cache: Any, context: Context, train: bool = False
    ) -> tuple[Float[Array, "b n c"], Any]:
        """Returns `(x, cache)` for the next tokens, given this layer's cache of those before."""
        return self.residual(x, cache, context, train)

    @nn.compact
    def residual(
        self, x: Float[Array, "b n c"], cache: Any, context: Context, train: bool
    ) -> tuple[Float[Array, "b n c"], Any]:
        """Both branches; without a cache the tokens are whole sequences."""
        h = rms_norm(self.epsilon, name="mixer_norm")(x)
        if cache is None:
            h = self.mixer(h, context, train=train)  # [B, N, C]
        else:
            h, cache = self.mixer.step(h, cache, context)  # [B, N, C]
        x = x + h
        x = x + self.ffn(rms_norm(self.epsilon, name="ffn_norm")(x), train=train)  # [B, N, C]
        return nn.with_logical_constraint(x, ("batch", "length", "features")), cache


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
    """

    block: DecoderBlock
    vocab: int
    dim: int
    depth: int
    tied: bool = False
    max_length: int | None = None
    remat: str = "none"
    unroll: int = 1

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
        return self.forward(tokens, Context(positions=positions), caches, False)

    @nn.nowrap
    def init_cache(self, batch: int, slots: int, dtype: DTypeLike = jnp.float32) -> Any:
        """Makes the empty caches of all layers, depth in front, for sequences of up to `slots` tokens.

        Raises:
          UsageError: for more slots than `max_length`.
        """
        self.check_length(slots)
        cache = self.block.mixer.init_cache(batch, slots, self.dim, dtype)
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (self.depth, *leaf.shape)), cache)

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
        init = named(truncated_normal(0.02), ("vocab", "embed"))
        table = self.param("embedding", init, (self.vocab, self.dim), jnp.float32)
        x = jnp.take(table, tokens, axis=0)  # [B, N, C]
        x = nn.with_logical_constraint(x, ("batch", "length", "features"))

        stack = Stack(self.block, self.depth, remat=self.remat, unroll=self.unroll, name="blocks")
        method = "__call__" if caches is None else "step"
        x, caches = stack(x, context, each=caches, method=method, train=train)  # [B, N, C]

        x = rms_norm(self.block.epsilon, name="norm")(x)  # [B, N, C]
        if not self.tied:
            init = named(truncated_normal(0.02), ("vocab", "embed"))
            table = self.param("head", init, (self.vocab, self.dim), jnp.float32)
        # Operands keep their dtype and the sums are float32: no float32 copy of a table of 128k rows.
        logits = jnp.einsum("bnc,vc->bnv", x, table, preferred_element_type=jnp.float32)  # [B, N, V]
        return nn.with_logical_constraint(logits, ("batch", "length", "vocab")), caches
