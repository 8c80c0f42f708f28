"""The decoding loop: a prompt goes in at once, then one token a step.

    caches = step(prompt[:-1]);   token_0 = prompt[-1]
    token_{t+1} ~ sample(step(token_t, caches))

The last token of the prompt is the first step of the loop, so that the loop has one body and the prompt's
logits, which nobody reads, are never computed.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from effjax.decoding.sampling import Sampling, sample
from effjax.errors import UsageError


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


@functools.partial(jax.jit, static_argnames=("model", "max_new", "sampling", "stop_token"))
def generate(
    model: nn.Module,
    variables: Any,
    prompts: Int[Array, "b n"],
    lengths: Int[Array, " b"],
    max_new: int,
    key: PRNGKeyArray,
    sampling: Sampling,
    stop_token: int | None = None,
) -> Int[Array, "b max_new"]:
    """Goes on from each prompt.

    Row `i` draws its token `t` with `fold_in(fold_in(key, i), t)`: what a prompt gets depends on its row, not
    on the prompts beside it.

    Args:
      model: with `init_cache(batch, slots, dtype)` and `step(tokens, caches, positions)`, as `LM` has.
      variables: of the model; caches take the dtype that the parameters promote to.
      prompts: tokens, padded in front; see `left_pad`.
      lengths: how many tokens of each row are the prompt, at least 1.
      max_new: tokens to write.
      key: of all draws.
      sampling: how a token is drawn.
      stop_token: ends a text; the loop ends when all texts have ended.

    Returns:
      The new tokens; from its first `stop_token` on, a row holds nothing else.

    Raises:
      UsageError: for no new tokens, or where prompt and new tokens exceed what the model is made for.
    """
    if max_new < 1:
        raise UsageError(f"max_new is {max_new}: ask for at least 1 token.")
    batch, size = prompts.shape
    slots = size + max_new - 1  # the last token written is never read
    caches = model.init_cache(batch, slots, jnp.result_type(*jax.tree.leaves(variables["params"])))
    positions = jnp.arange(size)[None, :] - (size - lengths)[:, None]  # [B, n], negative on padding
    if size > 1:
        _, caches = model.apply(variables, prompts[:, :-1], caches, positions[:, :-1], method="step")
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch))

    def unfinished(state: tuple[Any, ...]) -> Array:
        t, _, _, ended, _ = state
        return (t < max_new) & ~jnp.all(ended)

    def write(state: tuple[Any, ...]) -> tuple[Any, ...]:
        t, token, caches, ended, text = state
        logits, caches = model.apply(
            variables, token[:, None], caches, (lengths + t - 1)[:, None], method="step"
        )  # [B, 1, V]
        step_keys = jax.vmap(lambda key: jax.random.fold_in(key, t))(keys)
        token = jax.vmap(lambda row, key: sample(row, key, sampling))(logits[:, 0], step_keys)  # [B]
        if stop_token is not None:
            token = jnp.where(ended, stop_token, token)
            ended = ended | (token == stop_token)
        return t + 1, token, caches, ended, text.at[:, t].set(token)

    blank = jnp.full((batch, max_new), 0 if stop_token is None else stop_token, jnp.int32)
    start = (jnp.int32(0), prompts[:, -1].astype(jnp.int32), caches, jnp.zeros(batch, bool), blank)
    return jax.lax.while_loop(unfinished, write, start)[-1]
