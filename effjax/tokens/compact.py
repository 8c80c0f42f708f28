"""Fewer tokens in less time: padding is cut off before the layers behind, not only masked.

Shapes are static, so a bag whose tokens vary in number has room for the most there can be. Each part of the
network behind a reduction is therefore compiled for a few lengths, its buckets, and a batch runs through the
shortest that holds all the tokens of all its examples:

    bucket = min {b in buckets : b >= max_examples sum(mask)}
    bag <- pad(part(cut(bag, bucket)))

Nothing else changes: what is cut off is attended to by nobody. It serves every method that leaves padding
behind the tokens that exist, and whose choice among these does not depend on how much padding there is.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from effjax.errors import UsageError
from effjax.tokens.assignment import between
from effjax.tokens.tokens import Tokens


def check_buckets(buckets: tuple[int, ...]) -> None:
    """Raises UsageError for lengths that are none, or do not rise."""
    if any(bucket < 1 for bucket in buckets) or list(buckets) != sorted(set(buckets)):
        raise UsageError(f"buckets={buckets} must be numbers of tokens from 1 on that rise.")


def in_buckets(buckets: tuple[int, ...], run: Callable[[Tokens], Any], tokens: Tokens) -> Any:
    """Runs a part of a network on a bag at the shortest of some lengths that holds every example.

    Args:
      buckets: numbers of tokens between the ends, rising; the full number is one of them in any case.
      run: from a bag to `(bag, more)`.
      tokens: the bag; without a mask it is run as it is.

    Raises:
      UsageError: where a method keeps something of its own of every token.
    """
    lengths = (*(bucket for bucket in buckets if bucket < tokens.count), tokens.count)
    if tokens.mask is None or len(lengths) == 1:
        return run(tokens)
    if tokens.carried is not None:
        raise UsageError("a method that carries facts about tokens along cannot run in buckets: drop these.")
    kept = jax.eval_shape(run, tokens)[0].count

    def at(length: int, tokens: Tokens) -> Any:
        tokens, more = run(shortened(tokens, length))
        return lengthened(tokens, kept), more

    most = jnp.max(jnp.sum(tokens.inner(tokens.mask), axis=1))
    fitting = jnp.searchsorted(jnp.array(lengths), most)
    return jax.lax.switch(fitting, [functools.partial(at, length) for length in lengths], tokens)


def part_of(reduce: Any) -> Callable[[Callable[[Tokens], Any], Tokens], Any] | None:
    """How the parts of a network are run that a method with `buckets` reduces, or a schedule of such ones."""
    buckets = getattr(reduce, "buckets", ())
    return functools.partial(in_buckets, buckets) if buckets else None


def shortened(tokens: Tokens, length: int) -> Tokens:
    """The bag without its last padding."""
    cut = slice(tokens.ends[0], tokens.ends[0] + length)
    return _resized(tokens, lambda values: between(tokens, values[:, cut], values), length)


def lengthened(tokens: Tokens, length: int) -> Tokens:
    """The bag with padding up to a length."""

    def pad(values: Shaped[Array, "b n *rest"]) -> Shaped[Array, "b m *rest"]:
        shape = values.shape[0], length - tokens.count, *values.shape[2:]
        more = jnp.zeros(shape, values.dtype)
        return between(tokens, jnp.concatenate([tokens.inner(values), more], axis=1), values)

    return _resized(tokens, pad, length)


def _resized(tokens: Tokens, change: Callable[[Array], Array], length: int) -> Tokens:
    """The same tokens with room for another number; what stands behind the padding moves."""
    end = tokens.ends[0] + tokens.count
    origin = jnp.where(tokens.origin >= end, tokens.origin + length - tokens.count, tokens.origin)
    return dataclasses.replace(
        tokens,
        x=change(tokens.x),
        size=change(tokens.size),
        mask=change(tokens.mask),
        origin=origin,
        back=None if tokens.back is None else change(tokens.back.swapaxes(1, 2)).swapaxes(1, 2),
    )
