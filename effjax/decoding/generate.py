"""The decoding loop: one token a step, drawn from what the model says of the next.

    caches, token_0 = prefill(prompt)
    token_{t+1} ~ sample(step(token_t, caches))

`prefill` and `decode` are compiled once each. How many tokens a call of `decode` writes is data, so that the
same compiled function writes the first token, whose time is what a person waits for, and the rest.
"""

import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from effjax.decoding.prefill import Sequences, left_pad, prefill, slots_for
from effjax.decoding.sampling import Sampling, keys_of_rows, sample

__all__ = ["Writing", "begin", "decode", "generate", "left_pad"]


@flax.struct.dataclass
class Writing:
    """Texts that are being written.

    The fields are annotated `Any` because the same class also carries their shapes and shardings.

    Attributes:
      sequences: prompts and what was written, in the caches.
      keys: `[B]`, the key of each row's draws.
      text: `[B, max_new]` int, what was written; the stop token, or 0, where nothing is yet.
      written: `[]` int, tokens so far.
      ended: `[B]` bool, whether the stop token was written.
    """

    sequences: Sequences
    keys: Any
    text: Any
    written: Any
    ended: Any


def begin(sequences: Sequences, max_new: int, key: PRNGKeyArray, stop_token: int | None = None) -> Writing:
    """Texts of which nothing is written, after these prompts; the arguments are those of `generate`."""
    batch = sequences.tokens.shape[0]
    return Writing(
        sequences=sequences,
        keys=keys_of_rows(key, batch),
        text=jnp.full((batch, max_new), 0 if stop_token is None else stop_token, jnp.int32),
        written=jnp.int32(0),
        ended=jnp.zeros(batch, bool),
    )


@functools.partial(jax.jit, static_argnames=("model", "sampling", "stop_token"), donate_argnames="writing")
def decode(
    model: nn.Module,
    variables: Any,
    writing: Writing,
    until: Int[Array, ""] | int,
    sampling: Sampling,
    stop_token: int | None = None,
) -> Writing:
    """Writes until every text has `until` tokens or has ended.

    Args:
      model: as in `prefill`.
      variables: of the model.
      writing: what `begin` or an earlier call returned; its arrays are given up.
      until: tokens of a text, at most the `max_new` of `begin`.
      sampling: how a token is drawn.
      stop_token: ends a text, as in `begin`.
    """

    def unfinished(now: Writing) -> Array:
        return (now.written < until) & ~jnp.all(now.ended)

    def write(now: Writing) -> Writing:
        at = now.sequences
        logits, caches = model.apply(
            variables, at.tokens[:, None], at.caches, at.positions[:, None], method="step"
        )  # [B, 1, V]
        keys = jax.vmap(lambda key: jax.random.fold_in(key, now.written))(now.keys)
        tokens = jax.vmap(lambda row, key: sample(row, key, sampling))(logits[:, 0], keys)  # [B]
        tokens, ended = tokens.astype(jnp.int32), now.ended
        if stop_token is not None:
            tokens = jnp.where(ended, stop_token, tokens)
            ended = ended | (tokens == stop_token)
        return Writing(
            sequences=Sequences(caches, tokens, at.positions + 1),
            keys=now.keys,
            text=now.text.at[:, now.written].set(tokens),
            written=now.written + 1,
            ended=ended,
        )

    return jax.lax.while_loop(unfinished, write, writing)


def generate(
    model: nn.Module,
    variables: Any,
    prompts: Int[Any, "b n"],
    lengths: Int[Any, " b"],
    max_new: int,
    key: PRNGKeyArray,
    sampling: Sampling,
    stop_token: int | None = None,
    slots: int | None = None,
) -> Int[Array, "b max_new"]:
    """Goes on from each prompt.

    Row `i` draws its token `t` with `fold_in(fold_in(key, i), t)`: what a prompt gets depends on its row, not
    on the prompts beside it.

    Args:
      model: with a `vocab` and what `prefill` needs.
      variables: of the model; caches take the dtype that the parameters promote to.
      prompts: tokens, padded in front; see `left_pad`.
      lengths: how many tokens of each row are the prompt, at least 1.
      max_new: tokens to write.
      key: of all draws.
      sampling: how a token is drawn.
      stop_token: ends a text; the loop ends when all texts have ended.
      slots: of the caches, for calls of many sizes to share one shape; None takes as many as are needed.

    Returns:
      The new tokens; from its first `stop_token` on, a row holds nothing else.

    Raises:
      UsageError: as `slots_for` does, before anything is compiled.
    """
    slots = slots_for(model, prompts, max_new, slots)
    sequences = prefill(model, variables, jnp.asarray(prompts), jnp.asarray(lengths), slots)
    writing = begin(sequences, max_new, key, stop_token)
    return decode(model, variables, writing, max_new, sampling, stop_token).text
