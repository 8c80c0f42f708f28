"""What mixers that decode have in common: keys and values of the tokens so far, or a state of a set size.

`step` is the other view of the same layer: the next tokens, given what those before have left.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from effjax.decoding.cache import AXES, Cache, init_cache
from effjax.errors import UsageError
from effjax.mixers.context import Context


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
    def init_cache(self, batch: int, slots: int, width: int, dtype: DTypeLike = jnp.float32) -> Cache:
        """Makes an empty cache for sequences of up to `slots` tokens of `width` channels."""
        groups, size = self.sizes(width)
        return init_cache(batch, slots, groups, size, dtype)

    @nn.nowrap
    def cache_axes(self) -> Cache:
        """Names of the axes of a cache."""
        return AXES


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
