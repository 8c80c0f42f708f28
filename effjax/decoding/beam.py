"""Beam search: the likeliest texts instead of drawn ones.

    log p(y | prompt) = sum_t log p(y_t | prompt, y_<t)
    score(y) = log p(y | prompt) / |y|^length_penalty

A text ends at the stop token, which counts in `|y|`, or at the most tokens asked for. `beams` unfinished
texts are kept at each step; what ends among the best `2 beams` ways to go on is moved to the finished, of
which the best `beams` stay, so that a text that ends never pushes out one that goes on. With at least as many
beams as there are unfinished texts the result is the best of all texts, exactly.

The search stops when no unfinished text can still beat the worst finished one: `log p` only falls, and the
largest length divides it by the most.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.decoding.prefill import Sequences, prefill, slots_for
from effjax.errors import UsageError
from effjax.layers.stack import Layers


@dataclasses.dataclass(frozen=True)
class Beams:
    """How wide is searched, and what is best.

    Attributes:
      count: texts that are kept at each step, and returned.
      length_penalty: power of the length that divides the log-probability; 0 leaves it, which prefers short
        texts, and larger ones prefer longer texts.
    """

    count: int
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UsageError(f"beams is {self.count}: keep at least 1.")
        if not 0.0 <= self.length_penalty < float("inf"):
            raise UsageError(f"length_penalty is {self.length_penalty}: give 0 or a positive number.")

    def score(self, log_p: Float[Array, "*shape"], length: Int[Array, ""] | int) -> Float[Array, "*shape"]:
        """What texts of this length are compared by."""
        return log_p / jnp.asarray(length, jnp.float32) ** self.length_penalty


@flax.struct.dataclass
class Search:
    """Texts that are searched among: `K` unfinished and `K` finished ones for each prompt.

    Attributes:
      sequences: of the `B K` unfinished ones, prompt by prompt.
      text: `[B, K, max_new]` int, what the unfinished ones say.
      log_p: `[B, K]` float32, their log-probability; -inf where there is none.
      best: `[B, K, max_new]` int, the finished ones, best first; the stop token, or 0, behind their end.
      scores: `[B, K]` float32, of the finished ones; -inf where there is none.
      written: `[]` int, tokens so far.
    """

    sequences: Sequences
    text: Any
    log_p: Any
    best: Any
    scores: Any
    written: Any


def beam_search(
    model: nn.Module,
    variables: Any,
    prompts: Int[Any, "b n"],
    lengths: Int[Any, " b"],
    max_new: int,
    beams: Beams,
    stop_token: int | None = None,
    slots: int | None = None,
) -> tuple[Int[Array, "b beams max_new"], Float[Array, "b beams"]]:
    """The texts of highest score that go on from each prompt.

    Args:
      model: with a `vocab`, `cache_axes` and what `prefill` needs.
      variables: of the model.
      prompts: tokens, padded in front; see `left_pad`.
      lengths: how many tokens of each row are the prompt, at least 1.
      max_new: the most tokens of a text.
      beams: how wide, and by what score.
      stop_token: ends a text; without one all texts have `max_new` tokens.
      slots: of the caches; None takes as many as are needed.

    Returns:
      Texts and scores, best first. From its first `stop_token` on a text holds nothing else; where there are
      fewer texts than beams, the score is -inf.

    Raises:
      UsageError: as `slots_for` does, before anything is compiled.
    """
    slots = slots_for(model, prompts, max_new, slots)
    sequences = prefill(model, variables, jnp.asarray(prompts), jnp.asarray(lengths), slots)
    return search(model, variables, sequences, max_new, beams, stop_token)


@functools.partial(jax.jit, static_argnames=("model", "max_new", "beams", "stop_token"))
def search(
    model: nn.Module,
    variables: Any,
    sequences: Sequences,
    max_new: int,
    beams: Beams,
    stop_token: int | None = None,
) -> tuple[Int[Array, "b beams max_new"], Float[Array, "b beams"]]:
    """What follows the prefill; arguments and result are those of `beam_search`."""
    batch, k = sequences.tokens.shape[0], beams.count
    axes = model.cache_axes()

    def unfinished(now: Search) -> Array:
        possible = beams.score(jnp.max(now.log_p, axis=1), max_new)  # [B]
        return (now.written < max_new) & jnp.any(possible > jnp.min(now.scores, axis=1))

    def widen(now: Search) -> Search:
        at = now.sequences
        logits, caches = model.apply(
            variables, at.tokens[:, None], at.caches, at.positions[:, None], method="step"
        )  # [B K, 1, V]
        each = jax.nn.log_softmax(logits[:, 0].astype(jnp.float32)).reshape(batch, k, -1)  # [B, K, V]
        ways = (now.log_p[:, :, None] + each).reshape(batch, -1)  # [B, K V]
        log_p, way = jax.lax.top_k(ways, min(2 * k, ways.shape[1]))  # [B, 2K]
        origin, tokens = way // model.vocab, (way % model.vocab).astype(jnp.int32)  # [B, 2K]
        text = jnp.take_along_axis(now.text, origin[:, :, None], axis=1)  # [B, 2K, T]
        text = text.at[:, :, now.written].set(tokens)
        ends = jnp.full(tokens.shape, now.written + 1 == max_new)
        ends = ends if stop_token is None else ends | (tokens == stop_token)

        scores = jnp.where(ends, beams.score(log_p, now.written + 1), -jnp.inf)
        scores = jnp.concatenate([now.scores, scores], axis=1)  # [B, 3K]
        finished = jnp.concatenate([now.best, text], axis=1)  # [B, 3K, T]
        scores, kept = jax.lax.top_k(scores, k)  # [B, K]
        best = jnp.take_along_axis(finished, kept[:, :, None], axis=1)  # [B, K, T]

        log_p, going = jax.lax.top_k(jnp.where(ends, -jnp.inf, log_p), k)  # [B, K]
        origin, tokens = (jnp.take_along_axis(part, going, axis=1) for part in (origin, tokens))
        rows = (jnp.arange(batch)[:, None] * k + origin).reshape(-1)  # [B K]
        return Search(
            sequences=Sequences(_rows(caches, axes, rows), tokens.reshape(-1), at.positions + 1),
            text=jnp.take_along_axis(text, going[:, :, None], axis=1),
            log_p=log_p,
            best=best,
            scores=scores,
            written=now.written + 1,
        )

    rows = jnp.repeat(jnp.arange(batch), k)
    blank = jnp.full((batch, k, max_new), 0 if stop_token is None else stop_token, jnp.int32)
    start = Search(
        sequences=Sequences(
            _rows(sequences.caches, axes, rows), sequences.tokens[rows], sequences.positions[rows]
        ),
        text=blank,
        # All beams of a prompt start alike: one of them counts.
        log_p=jnp.broadcast_to(jnp.where(jnp.arange(k) == 0, 0.0, -jnp.inf)[None], (batch, k)),
        best=blank,
        scores=jnp.full((batch, k), -jnp.inf),
        written=jnp.int32(0),
    )
    found = jax.lax.while_loop(unfinished, widen, start)
    return found.best, found.scores


def _rows(caches: Any, axes: Any, rows: Int[Array, " n"]) -> Any:
    """These rows of the batch of every cache; `axes` names the axes of one layer's, depth comes in front."""

    def taken(leaf: Array, names: tuple[str | None, ...]) -> Array:
        if "pages" in names:
            raise UsageError("beams copy what sequences hold, and a page belongs to one: hold them plain.")
        return jnp.take(leaf, rows, axis=1 + names.index("batch")) if "batch" in names else leaf

    def taken_apart(leaf: Any, names: tuple[str | None, ...]) -> Any:
        if not isinstance(leaf, Layers):
            return taken(leaf, names)
        return Layers(tuple(taken(each[None], names)[0] for each in leaf.each))

    return jax.tree.map(taken_apart, caches, axes, is_leaf=lambda leaf: isinstance(leaf, Layers))
