"""What a model says of given tokens when it decodes them one by one: how a cache policy is judged.

    caches = step(tokens[:first]),   p_t = p(token_{t + 1} | caches),   caches <- step(token_t)

A pass over whole sequences knows nothing of a policy, which comes into play from step to step. Here a prompt
is read at once, and each token behind it is given instead of drawn.
"""

import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from effjax.decoding.prefill import new_caches
from effjax.errors import UsageError


@flax.struct.dataclass
class Said:
    """What was said of each target behind the prompt, and what the caches were in the end.

    Attributes:
      log_p: `[B, M]` float32, of the targets.
      likeliest: `[B, M]` int, the tokens of largest logit.
      caches: of all layers.
    """

    log_p: Any
    likeliest: Any
    caches: Any


@functools.partial(jax.jit, static_argnames=("model", "first"))
def forced(
    model: nn.Module,
    variables: Any,
    tokens: Int[Array, "b n"],
    targets: Int[Array, "b n"],
    first: int,
) -> Said:
    """Goes through sequences as decoding does.

    Args:
      model: as in `prefill`.
      variables: of the model.
      tokens: whole sequences, without padding.
      targets: what should follow each of them.
      first: tokens of the prompt, at least 1; the last of them is read alone, like those behind it.

    Returns:
      What is said of the targets from the prompt's last token on: `n - first + 1` of each sequence.

    Raises:
      UsageError: for a prompt that is empty or longer than the sequences.
    """
    batch, size = tokens.shape
    if not 1 <= first <= size:
        raise UsageError(f"first={first} must be between 1 and the {size} tokens of a sequence.")
    caches = new_caches(model, variables, batch, size)
    step = functools.partial(model.apply, variables, method="step")
    places = jnp.broadcast_to(jnp.arange(size)[None], tokens.shape)
    if first > 1:
        _, caches = step(tokens[:, : first - 1], caches, places[:, : first - 1])

    def go_on(caches: Any, given: tuple[Array, ...]) -> tuple[Any, tuple[Array, Array]]:
        token, target, place = given
        logits, caches = step(token[:, None], caches, place[:, None])  # [B, 1, V]
        logits = logits[:, 0].astype(jnp.float32)
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), target[:, None], axis=1)[:, 0]  # [B]
        return caches, (log_p, jnp.argmax(logits, axis=-1))

    rest = [array[:, first - 1 :].T for array in (tokens, targets, places)]  # [M, B]
    caches, (log_p, likeliest) = jax.lax.scan(go_on, caches, tuple(rest))
    return Said(log_p.T, likeliest.T, caches)
