"""Long reasoning as rounds of InftyThink: what each one reads, and what it shall write.

    thoughts = segment_1 .. segment_m,  |segment_i| <= eta,  cut between paragraphs wherever that can be
    round i:  question [history summary_i-1]  ->  segment_i [summary_token summary_i] stop

Every round is a training example of its own, with weights on what it writes alone. Nothing is lost: the
segments together are the thoughts. A paragraph begins behind an empty line with a capital letter, as in the
published code; unlike there a segment is closed before it has more than eta tokens and not after, and a
paragraph longer than eta is cut within.

`traces` reads thoughts and summaries from a file. `running_sum` makes them: x_t = x_t-1 + d modulo m, written
step by step with a counter down to 0, of which the last step is a summary of all: what a model of a small
context can only do in rounds.

Source: Yan et al. 2025, arXiv:2503.06692, section 3.2; see `effjax.decoding.inftythink`.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from effjax.config import part
from effjax.data import text
from effjax.data.records import BadRecord, Example, Metadata
from effjax.decoding.inftythink import InftyThink
from effjax.errors import UsageError

Tokens = Sequence[int]
# What was found out, from all tokens of the reasoning so far.
Summarise = Callable[[Tokens], Tokens]


@dataclasses.dataclass(frozen=True)
class Round:
    """A training example: `target` follows `prompt`."""

    prompt: list[int]
    target: list[int]


def paragraphs(thoughts: str) -> list[str]:
    """Cuts a text into paragraphs; each keeps the empty line behind it: together they are the text."""
    pieces: list[str] = []
    for line in re.split(r"(?<=\n\n)", thoughts):
        if pieces and not line[:1].isupper():
            pieces[-1] += line
        else:
            pieces.append(line)
    return pieces


def cut(pieces: Sequence[Tokens], eta: int) -> list[list[int]]:
    """Packs paragraphs into segments of at most `eta` tokens, in order, each as full as it can be.

    A paragraph of more than `eta` tokens begins a segment and is cut where it is full.
    """
    segments: list[list[int]] = []
    for piece in pieces:
        for start in range(0, len(piece), eta):
            run = list(piece[start : start + eta])
            if start or not segments or len(segments[-1]) + len(run) > eta:
                segments.append(run)
            else:
                segments[-1] += run
    return segments


def rounds(
    question: Tokens, pieces: Sequence[Tokens], summarise: Summarise, think: InftyThink
) -> list[Round]:
    """The rounds of one question.

    Args:
      question: its tokens.
      pieces: tokens of each paragraph; the last one is the answer.
      summarise: what was found out so far.
      think: lengths and marks.

    Raises:
      UsageError: for no paragraphs, or a summary longer than `think.summary`.
    """
    segments = cut(pieces, think.eta)
    if not segments:
        raise UsageError("there is nothing to think: give at least one paragraph.")
    prompt, so_far, made = list(question), list[int](), []
    for segment in segments[:-1]:
        so_far += segment
        summary = list(summarise(so_far))
        if len(summary) > think.summary:
            raise UsageError(f"a summary has {len(summary)} tokens, and summary={think.summary} is the most.")
        made.append(Round(prompt, [*segment, think.summary_token, *summary, think.stop_token]))
        prompt = [*question, think.history_token, *summary]
    return [*made, Round(prompt, [*segments[-1], think.stop_token])]


def row(example: Round, length: int) -> Example:
    """One round in the fields of packed text, cut or padded to `length` tokens."""
    tokens = np.asarray(example.prompt + example.target, np.int32)[: length + 1]
    rest = (0, length + 1 - len(tokens))
    segments = np.pad(np.ones(len(tokens), np.int32), rest)
    said = np.arange(length + 1) >= len(example.prompt)
    tokens = np.pad(tokens, rest)
    return {
        "tokens": tokens[:-1],
        "targets": tokens[1:],
        "segments": segments[:-1],
        "positions": np.arange(length, dtype=np.int32),
        "weights": (said & (segments > 0))[1:].astype(np.float32),
    }


@dataclasses.dataclass(frozen=True)
class Traces:
    """Reasoning from a file, one JSON object a line, every round of it an example.

    An object has texts `question`, `thoughts` and `answer`, and `summaries`: for every paragraph of the
    thoughts what is known behind it. Those behind segments are read.

    Attributes:
      path: the file.
      length: tokens a row; a longer round is a broken record.
      think: lengths and marks.
      tokenizer: a kind of `effjax.data.text.KINDS`. Its separator begins the question.
    """

    path: str
    length: int
    think: InftyThink
    tokenizer: Any = part(text.KINDS, default=text.Bytes())

    def open(self) -> "TracesReader":
        """Raises UsageError for a file that is missing or has no lines."""
        path = Path(self.path).expanduser()
        if not path.is_file():
            raise UsageError(f"The JSON lines file {path} does not exist.")
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not lines:
            raise UsageError(f"The JSON lines file {path} has no lines.")
        return TracesReader(self, lines)


class TracesReader:
    """Rounds by number; how many a line has is found out once, at the beginning."""

    def __init__(self, definition: Traces, lines: list[str]) -> None:
        self.definition = definition
        self.metadata = Metadata()
        # A line that cannot be read counts as one example, which whoever asks for it is told.
        self._rounds: list[tuple[int, Round | str]] = []
        for number, line in enumerate(lines, start=1):
            try:
                self._rounds += [(number, made) for made in self._read(line)]
            except (ValueError, KeyError, TypeError, UsageError) as error:
                self._rounds.append((number, f"{type(error).__name__}: {error}"))

    def __len__(self) -> int:
        return len(self._rounds)

    def __getitem__(self, index: int) -> Example:
        number, found = self._rounds[index]
        length = self.definition.length
        if isinstance(found, Round) and len(found.prompt) + len(found.target) > length + 1:
            found = f"a round of {len(found.prompt) + len(found.target)} tokens exceeds length={length}"
        if isinstance(found, str):
            raise BadRecord(f"{self.definition.path}, line {number}: {found}")
        return row(found, length)

    def _read(self, line: str) -> list[Round]:
        record, tokenizer = json.loads(line), self.definition.tokenizer

        def encode(said: str) -> list[int]:
            return tokenizer.encode(said.encode()).tolist()

        pieces = [encode(piece) for piece in paragraphs(record["thoughts"])]
        ends = np.cumsum([len(piece) for piece in pieces]).tolist()
        known = dict(zip(ends, record["summaries"], strict=False))

        def summarise(so_far: Tokens) -> list[int]:
            if len(so_far) not in known:
                raise ValueError(f"there is no summary behind token {len(so_far)} of the thoughts")
            return encode(known[len(so_far)])

        question = [tokenizer.separator, *encode(record["question"])]
        return rounds(question, [*pieces, encode(record["answer"])], summarise, self.definition.think)


# Of the tokens of a running sum 0 to 2 are marks, and 3 stands before the answer; counters and values follow.
ANSWER = 3
FIRST = 4


@dataclasses.dataclass(frozen=True)
class RunningSum:
    """Sums modulo m by rounds: `d, steps, x_0` are asked, and `x_steps` is the answer.

    A step is written as two tokens, how many are still to come and the sum; the last step is the summary. An
    example is a round of a question, both drawn.

    Attributes:
      length: tokens a row.
      think: lengths and marks.
      steps: the most there are.
      least: the fewest.
      modulus: m.
      cut: whether rounds longer than a row are cut; else they are refused.
      examples: of an epoch.
      seed: of all of them; another one for evaluation than for training.
    """

    length: int
    think: InftyThink
    steps: int
    least: int = 1
    modulus: int = 10
    cut: bool = False
    examples: int = 2**16
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.steps:
            raise UsageError(f"least={self.least} must be between 1 and steps={self.steps}.")
        for name in ("length", "modulus", "examples"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} must be at least 1.")
        longest = min(self.think.peak(4) + 1, 4 + 2 * self.steps + 3)
        if longest > self.length + 1 and not self.cut:
            raise UsageError(f"rounds have up to {longest} tokens: give length={longest - 1}, or cut=True.")

    @property
    def vocab(self) -> int:
        """How many tokens there are."""
        return FIRST + self.steps + 1 + self.modulus

    def ask(self, index: int) -> tuple[list[int], list[int]]:
        """A question by number, and the tokens that its answer ends with."""
        question, pieces = self._draw(self._rng(index))
        return question, pieces[-1]

    def open(self) -> "RunningSum":
        """It is its own reader."""
        return self

    @property
    def metadata(self) -> Metadata:
        """Nothing but its identity."""
        return Metadata(identity=repr(self))

    def __len__(self) -> int:
        return self.examples

    def __getitem__(self, index: int) -> Example:
        rng = self._rng(index)
        question, pieces = self._draw(rng)
        made = rounds(question, pieces, lambda so_far: so_far[-2:], self.think)
        return row(made[rng.integers(len(made))], self.length)

    def _rng(self, index: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self.seed, index]))

    def _draw(self, rng: np.random.Generator) -> tuple[list[int], list[list[int]]]:
        """A question and the paragraphs of its thoughts, the last of which is the answer."""
        steps = int(rng.integers(self.least, self.steps + 1))
        start, step = rng.integers(0, self.modulus, 2)
        values = FIRST + self.steps + 1
        sums = (values + (start + step * np.arange(steps + 1)) % self.modulus).tolist()
        counters = (FIRST + np.arange(steps, -1, -1)).tolist()
        question = [self.think.stop_token, int(values + step), counters[0], sums[0]]
        thoughts = [list(pair) for pair in zip(counters[1:], sums[1:], strict=True)]
        return question, [*thoughts, [ANSWER, sums[-1]]]
