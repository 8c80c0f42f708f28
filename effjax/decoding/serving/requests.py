"""What is asked for, and what becomes of it."""

import dataclasses
from typing import Literal

from effjax.decoding.sampling import Sampling
from effjax.errors import RunError, UsageError

# Why an answer ended: a stop token, enough tokens, or nobody wants it any more.
End = Literal["stop", "length", "cancelled"]


class TooLarge(UsageError):
    """A request that would not fit if it were alone."""


class QueueFull(RunError):
    """A request that came when as many waited as may wait; later it may be taken."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A text to go on from.

    Attributes:
      prompt: its tokens, at least one.
      max_new: the most tokens to write.
      sampling: how a token is drawn.
      seed: of the draws; it counts modulo 2^32.
      stop_tokens: each ends the answer.
      cache: name of the lane: under which cache policy is written.
    """

    prompt: tuple[int, ...]
    max_new: int
    sampling: Sampling = Sampling()  # noqa: RUF009 (it is frozen)
    seed: int = 0
    stop_tokens: frozenset[int] = frozenset()
    cache: str = "all"

    def __post_init__(self) -> None:
        if not self.prompt:
            raise UsageError("the prompt is empty: give at least one token to go on from.")
        if self.max_new < 1:
            raise UsageError(f"max_new is {self.max_new}: ask for at least 1 token.")

    @property
    def held(self) -> int:
        """Tokens that a cache which keeps all holds at the end: the last one written is never read."""
        return len(self.prompt) + self.max_new - 1


@dataclasses.dataclass(eq=False)
class Answer:
    """What becomes of a request. Times are of one clock, in seconds; None for what has not happened.

    Attributes:
      request: what was asked.
      arrived: when.
      joined: when it got a row and pages.
      first: when its first token was there.
      ended: when it ended.
      end: why.
      tokens: what was written, the stop token included.
      row: of the running batch.
      pages: that it owns.
      cache_bytes: of these pages and of what the row holds besides, in all layers; it stays when they go.
      unwanted: whether somebody cancelled it; it ends before the next step.
    """

    request: Request
    arrived: float
    joined: float | None = None
    first: float | None = None
    ended: float | None = None
    end: End | None = None
    tokens: list[int] = dataclasses.field(default_factory=list)
    row: int | None = None
    pages: tuple[int, ...] = ()
    cache_bytes: int = 0
    unwanted: bool = False

    @property
    def tokens_per_second(self) -> float:
        """Behind the first token; 0 where there are none."""
        if self.first is None or self.ended is None or len(self.tokens) < 2:
            return 0.0
        return (len(self.tokens) - 1) / max(self.ended - self.first, 1e-9)


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that happened to an answer in a step: a token, its end, or both."""

    answer: Answer
    token: int | None = None
    end: End | None = None
