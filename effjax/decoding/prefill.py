"""The first of the two functions of decoding: all prompts go in at once, and caches come out.

    caches = step(prompt[:-1]),   token = prompt[-1]

The last token of a prompt is left to the loop that follows, so that the loop has one body and the prompt's
logits, which nobody reads, are never computed.

Prompts of unequal length are padded in front. Padding stands at negative positions: attention never sees it,
and a recurrent state does not take it in. What is written after a prompt depends on the prompt alone, not on
the prompts beside it.
"""

import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from effjax.errors import UsageError
from effjax.layers.stack import apart, is_apart
from effjax.layers.stored import dtype_of


@flax.struct.dataclass
class Sequences:
    """Where sequences stand between two steps.

    The fields are annotated `Any` because the same class also carries their shapes and shardings.

    Attributes:
      caches: of all layers, holding every token but the last; depth is in front.
      tokens: `[B]` int, the last token of each sequence.
      positions: `[B]` int, its place.
    """

    caches: Any
    tokens: Any
    positions: Any


def left_pad(prompts: list[list[int]]) -> tuple[Int[np.ndarray, "b n"], Int[np.ndarray, " b"]]:
    """Lays prompts of unequal length out as rows that end together, padded with 0 in front.

    Returns:
      The rows, and the length of each prompt.

    Raises:
      UsageError: for an empty prompt.
    """
    if not prompts or not all(prompts):
        raise UsageError("the prompt is empty: give at least one token to go on from.")
    longest = max(map(len, prompts))
    rows = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    return np.asarray(rows, np.int32), np.asarray([len(prompt) for prompt in prompts], np.int32)


def slots_for(model: nn.Module, prompts: Int[Any, "b n"], max_new: int, slots: int | None = None) -> int:
    """How many tokens the caches hold, after a look at what is asked for; nothing is compiled.

    Args:
      model: with a `vocab`, and `max_length` where there is a limit.
      prompts: tokens, padded in front.
      max_new: tokens to write.
      slots: of the caches; None takes as many as are needed.

    Raises:
      UsageError: for no new tokens, tokens that the model does not know, a prompt that with the new tokens
        exceeds the caches, or caches that exceed what the model is made for.
    """
    if max_new < 1:
        raise UsageError(f"max_new is {max_new}: ask for at least 1 token.")
    tokens = np.asarray(prompts)
    if strange := [int(token) for token in (tokens.min(), tokens.max()) if not 0 <= token < model.vocab]:
        raise UsageError(
            f"token {strange[0]} is unknown: the model has the tokens 0 to {model.vocab - 1}. Was the prompt "
            f"made by another tokenizer?"
        )
    needed = tokens.shape[1] + max_new - 1  # the last token written is never read
    if slots is not None and needed > slots:
        raise UsageError(
            f"a prompt of {tokens.shape[1]} tokens and {max_new} new ones do not fit a cache of {slots} "
            f"slots: give it {needed}, or ask for less."
        )
    slots = needed if slots is None else slots
    limit = getattr(model, "max_length", None)
    if limit is not None and slots > limit:
        raise UsageError(
            f"a cache for {slots} tokens is longer than the {limit} that the model is made for (max_length): "
            f"the prompt has {tokens.shape[1]} tokens and {max_new} are to be written."
        )
    return slots


@functools.partial(jax.jit, static_argnames=("model", "slots"))
def prefill(
    model: nn.Module, variables: Any, prompts: Int[Array, "b n"], lengths: Int[Array, " b"], slots: int
) -> Sequences:
    """Reads all tokens of the prompts but the last into new caches.

    Args:
      model: with `init_cache(batch, slots, dtype)` and `step(tokens, caches, positions)`, as `LM` has.
      variables: of the model; caches take the dtype that the parameters promote to. Where its layers stand
        apart, so do the caches.
      prompts: tokens, padded in front; see `left_pad`.
      lengths: how many tokens of each row are the prompt, at least 1.
      slots: how many tokens the caches hold; see `slots_for`.

    Raises:
      UsageError: for more slots than the model is made for.
    """
    batch, size = prompts.shape
    caches = new_caches(model, variables, batch, slots)
    positions = jnp.arange(size)[None, :] - (size - lengths)[:, None]  # [B, n], negative on padding
    if size > 1:
        _, caches = model.apply(variables, prompts[:, :-1], caches, positions[:, :-1], method="step")
    return Sequences(caches, prompts[:, -1].astype(jnp.int32), (lengths - 1).astype(jnp.int32))


def new_caches(model: nn.Module, variables: Any, batch: int, slots: int) -> Any:
    """Empty caches in the dtype that the parameters promote to, apart where the model's layers are."""
    caches = model.init_cache(batch, slots, dtype_of(variables["params"]))
    return apart(caches) if is_apart(variables) else caches
