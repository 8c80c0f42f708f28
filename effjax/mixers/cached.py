"""What mixers that decode have in common: keys and values of the tokens so far, or a state of a set size.

`step` is the other view of the same layer: the next tokens, given what those before have left.
"""

from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from effjax.decoding.cache import Cache, visible
from effjax.decoding.policies.policy import Policy
from effjax.errors import UsageError
from effjax.mixers.context import Context
from effjax.mixers.dot_product import weighted_sum


@runtime_checkable
class Weigh(Protocol):
    """How much of each value the queries of a mixer take, in float32."""

    def __call__(
        self,
        queries: Float[Array, "b n h d"],
        keys: Float[Array, "b s g d"],
        allowed: Bool[Array, "#b #h #n s"],
        bias: Float[Array, "b h 1 s"] | None,
    ) -> Float[Array, "b h n s"]:
        """Weights of the keys where they are allowed; the bias is added to the logits."""


@runtime_checkable
class Take(Protocol):
    """What the queries of a mixer take from values, which may need less memory than all weights do."""

    def __call__(
        self,
        queries: Float[Array, "b n h d"],
        keys: Float[Array, "b s g d"],
        values: Float[Array, "b s g e"],
        allowed: Bool[Array, "#b #h #n s"],
        bias: Float[Array, "b h 1 s"] | None,
    ) -> Float[Array, "b n h e"]:
        """The sum of values by the weights of their keys."""


class KeyValue(nn.Module):
    """Attention, whose heads keep keys and values; `attend` and `sizes` are what it does."""

    def attend(
        self, x: Float[Array, "b n c"], context: Context, cache: Cache | None
    ) -> tuple[Float[Array, "b n c"], Any]:
        """Attends among the tokens of `x` (no cache), or from them to the cache they are added to."""
        raise NotImplementedError

    def sizes(self, width: int) -> tuple[int, int]:
        """Returns how many key/value heads there are, and the channels of a head."""
        raise NotImplementedError

    @nn.nowrap
    def value_size(self) -> int | None:
        """Channels of a head's values; None where they are those of its keys."""
        return None

    @nn.nowrap
    def positions(
        self, x: Float[Array, "b n c"], context: Context, cache: Cache | None
    ) -> Int[Array, "#b n"]:
        """Those of the tokens: the context's, or else one after the other behind what the cache has seen."""
        if context.positions is not None:
            return context.positions
        following = jnp.arange(x.shape[1]) + (0 if cache is None else cache.written)
        return jnp.broadcast_to(following[None], x.shape[:2])

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
        _only_positions(context)
        return self.attend(x, context, cache)

    @nn.nowrap
    def remember(
        self,
        q: Float[Array, "b n h d"],
        k: Float[Array, "b n g d"],
        v: Float[Array, "b n g e"],
        positions: Int[Array, "b n"],
        cache: Cache,
        context: Context,
        weigh: Weigh,
        causal: bool = True,
        window: int | None = None,
        take: Take | None = None,
    ) -> tuple[Float[Array, "b n h e"], Cache]:
        """Adds tokens to the cache, and lets them look at what its policy keeps.

        Args:
          q: queries of the new tokens.
          k: their keys.
          v: their values.
          positions: of the new tokens.
          cache: of those before.
          context: its `cache` is the policy, None to keep all; its `window` goes before the mixer's.
          weigh: weights of keys, given queries, the mask and what is added to the logits.
          causal: whether a token sees only itself and tokens before it.
          window: the mixer's.
          take: what is taken from values, where nobody asks for the weights; None sums by `weigh`.
        """
        window = window if context.window is None else context.window

        def look(
            keys: Array,
            values: Array,
            held: Array,
            size: Array | None = None,
            among: Array | None = None,
            tell: bool = False,
            part: tuple[Array | int, int] | None = None,
        ) -> tuple[Array, Array | None]:
            queries, at = q, positions
            if part is not None:
                queries, at = (jax.lax.dynamic_slice_in_dim(whole, *part, axis=1) for whole in (q, positions))
            allowed = visible(held, at, causal, window)  # [B, 1 or G, 1 or N, S]
            allowed = allowed if among is None else allowed & among
            bias = None if size is None else jnp.log(size).swapaxes(1, 2)[:, :, None, :]  # [B, G, 1, S]
            each = q.shape[2] // keys.shape[2]
            allowed = allowed if allowed.shape[1] == 1 else jnp.repeat(allowed, each, axis=1)
            bias = None if bias is None else jnp.repeat(bias, each, axis=1)
            if take is not None and not tell:
                return take(queries, keys, values, allowed, bias), None
            weights = weigh(queries, keys, allowed, bias)  # [B, H, N, S]
            y = weighted_sum(weights.astype(values.dtype), values)  # [B, N, H, D]
            # What padding attends to is nobody's attention.
            return y, jnp.where(at[:, None, :, None] < 0, 0, weights) if tell else None

        return (context.cache or Policy()).attend(cache, q, k, v, positions, look)

    @nn.nowrap
    def init_cache(
        self,
        batch: int,
        slots: int,
        width: int,
        dtype: DTypeLike = jnp.float32,
        policy: Policy | None = None,
    ) -> Cache:
        """Makes an empty cache for sequences of up to `slots` tokens of `width` channels; None keeps all."""
        groups, size = self.sizes(width)
        return (policy or Policy()).init(batch, slots, groups, size, dtype, self.value_size())

    @nn.nowrap
    def cache_axes(self, policy: Policy | None = None) -> Cache:
        """Names of the axes of a cache."""
        return (policy or Policy()).axes()


class Recurrent(nn.Module):
    """A layer with a state that does not grow; `mix` is what it does."""

    def mix(
        self, x: Float[Array, "b n c"], context: Context, cache: Any
    ) -> tuple[Float[Array, "b n c"], Any]:
        """Both views of a sequence: whole (no state), or going on from a state."""
        raise NotImplementedError

    def __call__(
        self, x: Float[Array, "b n c"], context: Context, train: bool = False
    ) -> Float[Array, "b n c"]:
        """Mixes the tokens of whole sequences; documents of a packed row do not see each other."""
        y, _ = self.mix(x, context, None)
        return y

    def step(
        self, x: Float[Array, "b n c"], cache: Any, context: Context
    ) -> tuple[Float[Array, "b n c"], Any]:
        """Mixes the next `n` tokens, given the state that those before have left.

        Args:
          x: one token or a whole prompt.
          cache: what `init_cache` made and earlier steps filled.
          context: of it `positions` count, negative for padding in front.

        Raises:
          UsageError: for a context with segments, valid or size.
        """
        _only_positions(context)
        return self.mix(x, context, cache)


def _only_positions(context: Context) -> None:
    if not (context.segments is context.valid is context.size is None):
        raise UsageError("a cached step knows its tokens by position alone: give no segments, valid or size.")
