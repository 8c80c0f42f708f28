"""InftyThink: reasoning in rounds, each of which begins with the question and what the last one found out.

    round 1      question                        -> segment_1, summary token, summary_1, stop token
    round i      question, history token, s_i-1  -> segment_i, summary token, summary_i, stop token
    last round   question, history token, s_i-1  -> segment, with the answer,            stop token

After each round the cache is dropped, so that it never holds more than

    |q| + 1 + |s| + eta + 1 + |s|                                  tokens, in a sawtooth

and n tokens of reasoning attend to O(n eta) others in place of O(n^2). A segment that has `eta` tokens is
told to end: the summary token follows whatever the model would have said. A summary is held to its length in
the same way. A round that ends without a summary is the last.

All rounds have one shape and are compiled once; the loop over them is the host's.

Source: Yan et al., "InftyThink: Breaking the Length Limits of Long-Context Reasoning in Large Language
Models", 2025, arXiv:2503.06692, section 3; github.com/ZJU-REAL/InftyThink, where eta is 2048, 4096 or 6144,
there are at most 50 rounds, and the tokens are the texts `<history>` and `<summary>`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from effjax.decoding.prefill import Sequences, prefill, slots_for
from effjax.decoding.sampling import Sampling, keys_of_rows, sample
from effjax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class InftyThink:
    """How long a round is, and what marks its parts.

    Attributes:
      eta: the most tokens of a segment.
      summary: the most tokens of a summary.
      rounds: the most rounds of a question.
      history_token: stands between the question and the last round's summary.
      summary_token: ends a segment, and begins its summary.
      stop_token: ends a round.
    """

    eta: int
    summary: int
    rounds: int = 50
    history_token: int = 1
    summary_token: int = 2
    stop_token: int = 0

    def __post_init__(self) -> None:
        for name in ("eta", "summary", "rounds"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} must be at least 1.")
        marks = self.history_token, self.summary_token, self.stop_token
        if len({*marks}) < 3:
            raise UsageError(f"history, summary and stop token must differ, not be {marks}.")

    @property
    def new(self) -> int:
        """The most tokens that a round writes, both marks included."""
        return self.eta + 1 + self.summary + 1

    def width(self, question: int) -> int:
        """Tokens of the longest prompt for a question of so many."""
        return question + 1 + self.summary

    def peak(self, question: int) -> int:
        """The most tokens that a cache ever holds; the stop token is not read."""
        return self.width(question) + self.new - 1


@dataclasses.dataclass(frozen=True)
class Round:
    """What one round read and wrote, marks between the parts left out.

    Attributes:
      prompt: the question, and what the round before found out.
      segment: the reasoning, and in the last round the answer.
      summary: what was found out; None in a round that gave none, the last.
    """

    prompt: tuple[int, ...]
    segment: tuple[int, ...]
    summary: tuple[int, ...] | None

    @property
    def read(self) -> int:
        """Tokens in the cache at its end."""
        return len(self.prompt) + len(self.segment) + (0 if self.summary is None else 1 + len(self.summary))


@dataclasses.dataclass(frozen=True)
class Reasoning:
    """All rounds of one question."""

    rounds: tuple[Round, ...]

    @property
    def finished(self) -> bool:
        """Whether the last round gave an answer; else there were no more rounds."""
        return self.rounds[-1].summary is None

    @property
    def answer(self) -> tuple[int, ...] | None:
        """The last segment, which ends with the answer; None where there is none."""
        return self.rounds[-1].segment if self.finished else None


def reason(
    model: nn.Module,
    variables: Any,
    questions: Sequence[Sequence[int]],
    think: InftyThink,
    key: PRNGKeyArray,
    sampling: Sampling,
) -> list[Reasoning]:
    """Thinks about several questions at once, until all have an answer or there are no more rounds.

    Row `i` draws its token `t`, counted with the places of all rounds before, with `fold_in(fold_in(key, i),
    t)`, as `generate` does.

    Args:
      model: as in `generate`.
      variables: of the model.
      questions: tokens of each.
      think: lengths and marks.
      key: of all draws.
      sampling: how a token is drawn.

    Raises:
      UsageError: for an empty question, and as `slots_for` does for the longest round.
    """
    if not questions or not all(questions):
        raise UsageError("a question is empty: give at least one token to think about.")
    prompts = [tuple(question) for question in questions]
    width = think.width(max(map(len, prompts)))
    keys = keys_of_rows(key, len(prompts))
    rounds: list[list[Round]] = [[] for _ in prompts]
    for number in range(think.rounds):
        rows = np.zeros((len(prompts), width), np.int32)
        for row, prompt in zip(rows, prompts, strict=True):
            row[width - len(prompt) :] = prompt
        slots_for(model, rows, think.new)
        lengths = jnp.asarray([len(prompt) for prompt in prompts], jnp.int32)
        first = jnp.int32(number * think.new)
        text, _ = write_round(model, variables, jnp.asarray(rows), lengths, keys, first, think, sampling)
        for i, written in enumerate(np.asarray(text).tolist()):
            if rounds[i] and rounds[i][-1].summary is None:
                continue
            segment, summary = parts(written, think)
            rounds[i].append(Round(prompts[i], segment, summary))
            if summary is not None:
                prompts[i] = (*questions[i], think.history_token, *summary)
        if all(done[-1].summary is None for done in rounds):
            break
    return [Reasoning(tuple(done)) for done in rounds]


def parts(written: Sequence[int], think: InftyThink) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Segment and summary of what a round wrote; None where it has no summary."""
    text = tuple(written)
    text = text[: text.index(think.stop_token)] if think.stop_token in text else text
    if think.summary_token not in text:
        return text, None
    at = text.index(think.summary_token)
    return text[:at], text[at + 1 :]


@flax.struct.dataclass
class Writing:
    """Rounds that are being written.

    The fields are annotated `Any` because the same class also carries their shapes and shardings.

    Attributes:
      sequences: prompts and what was written, in the caches.
      text: `[B, new]` int; the stop token where nothing is yet.
      written: `[]` int, tokens so far.
      size: `[B]` int, tokens of the part that is being written, segment or summary.
      summing: `[B]` bool, whether that is the summary.
      ended: `[B]` bool, whether the stop token was written.
    """

    sequences: Sequences
    text: Any
    written: Any
    size: Any
    summing: Any
    ended: Any


@functools.partial(jax.jit, static_argnames=("model", "think", "sampling"))
def write_round(
    model: nn.Module,
    variables: Any,
    prompts: Int[Array, "b n"],
    lengths: Int[Array, " b"],
    keys: Any,
    first: Int[Array, ""],
    think: InftyThink,
    sampling: Sampling,
) -> tuple[Int[Array, "b new"], Sequences]:
    """One round of every row, from an empty cache to the stop token.

    Args:
      model: as in `prefill`.
      variables: of the model.
      prompts: tokens, padded in front.
      lengths: how many tokens of each row are the prompt.
      keys: `[B]`, of each row's draws.
      first: number of the round's first draw.
      think: lengths and marks.
      sampling: how a token is drawn.

    Returns:
      What was written, the stop token behind the end; and the sequences, to look at their caches.
    """
    batch, width = prompts.shape

    def unfinished(now: Writing) -> Array:
        return (now.written < think.new) & ~jnp.all(now.ended)

    def write(now: Writing) -> Writing:
        at = now.sequences
        logits, caches = model.apply(
            variables, at.tokens[:, None], at.caches, at.positions[:, None], method="step"
        )  # [B, 1, V]
        drawn = jax.vmap(lambda key: jax.random.fold_in(key, first + now.written))(keys)
        tokens = jax.vmap(lambda row, key: sample(row, key, sampling))(logits[:, 0], drawn)  # [B]
        tokens = tokens.astype(jnp.int32)
        marked = (tokens == think.summary_token) | (tokens == think.stop_token)
        tokens = jnp.where(~now.summing & (now.size == think.eta) & ~marked, think.summary_token, tokens)
        over = now.ended | (now.summing & (now.size == think.summary))
        tokens = jnp.where(over, think.stop_token, tokens)
        begun = ~now.summing & (tokens == think.summary_token)
        return Writing(
            sequences=Sequences(caches, tokens, at.positions + 1),
            text=now.text.at[:, now.written].set(tokens),
            written=now.written + 1,
            size=jnp.where(begun, 0, now.size + 1),
            summing=now.summing | begun,
            ended=now.ended | (tokens == think.stop_token),
        )

    start = Writing(
        sequences=prefill(model, variables, prompts, lengths, width + think.new - 1),
        text=jnp.full((batch, think.new), think.stop_token, jnp.int32),
        written=jnp.int32(0),
        size=jnp.zeros(batch, jnp.int32),
        summing=jnp.zeros(batch, bool),
        ended=jnp.zeros(batch, bool),
    )
    done = jax.lax.while_loop(unfinished, write, start)
    return done.text, done.sequences
