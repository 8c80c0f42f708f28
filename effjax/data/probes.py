"""Probes: sequences of random tokens in which some can be known, if one looks back at the right place.

    copy        x_1 .. x_n | x_1 .. x_n                 the second half: Jelassi et al. 2024
    recall      k_1 v_1 .. k_p v_p  k_j v_j k_i v_i ..  values of keys seen before: Arora et al. 2024
    induction   x x | a x x x x | a                     what followed `|` before: Olsson et al. 2022, as the
                                                        single question of Fu et al. 2023
    needle      h h | v_1 .. v_m h h h h | v_1 .. v_m   a passage among others: Mohtashami and Jaggi 2023

`|` is the token 1 and everything else is drawn anew for each sequence, so that weights can hold no answer:
what a model gets right it fetched from its context. Only answers have the weight 1. A model is trained on
them by `source=dict(kind="probe", task=dict(kind="recall"), length=64)`, and any language model can be asked.

Sequence `i` is a function of the seed and `i` alone.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int64

from effjax.config import part
from effjax.data.records import Example, Metadata
from effjax.errors import UsageError

# Of the tokens 0 is padding and 1 asks; symbols follow.
MARK = 1
FIRST = 2

Sequence = Int64[np.ndarray, "places"]
Answers = Bool[np.ndarray, "places"]


@runtime_checkable
class Task(Protocol):
    """What is asked."""

    def make(self, rng: np.random.Generator, places: int, vocab: int) -> tuple[Sequence, Answers]:
        """Draws a sequence of at most so many places, and says which are answers.

        Raises:
          UsageError: for too few places or tokens.
        """


@dataclasses.dataclass(frozen=True)
class Copy:
    """Says again what stood before the mark."""

    def make(self, rng: np.random.Generator, places: int, vocab: int) -> tuple[Sequence, Answers]:
        """Half of the places are answers."""
        count = (places - 1) // 2
        _enough("copy", places, 3, vocab, FIRST + 2)
        said = rng.integers(FIRST, vocab, count)
        return np.concatenate([said, [MARK], said]), np.arange(2 * count + 1) > count


@dataclasses.dataclass(frozen=True)
class Recall:
    """Gives the value that a key was paired with; keys are the lower half of the symbols, values the upper.

    Attributes:
      pairs: how many there are; None fills half of the places.
    """

    pairs: int | None = None

    def __post_init__(self) -> None:
        if self.pairs is not None and self.pairs < 1:
            raise UsageError(f"pairs={self.pairs} must be at least 1.")

    def make(self, rng: np.random.Generator, places: int, vocab: int) -> tuple[Sequence, Answers]:
        """Behind the pairs every second place is an answer."""
        pairs = max(places // 4, 1) if self.pairs is None else self.pairs
        asked = places // 2 - pairs
        _enough("recall", places, 2 * pairs + 2, vocab, FIRST + 2 * pairs)
        middle = (FIRST + vocab) // 2
        keys = rng.permutation(np.arange(FIRST, middle))[:pairs]
        values = rng.integers(middle, vocab, pairs)
        which = np.concatenate([np.arange(pairs), rng.integers(0, pairs, asked)])
        sequence = np.stack([keys[which], values[which]], axis=1).reshape(-1)
        place = np.arange(len(sequence))
        return sequence, (place >= 2 * pairs) & (place % 2 == 1)


@dataclasses.dataclass(frozen=True)
class Induction:
    """Says what followed the mark when it stood before, anywhere in the sequence."""

    def make(self, rng: np.random.Generator, places: int, vocab: int) -> tuple[Sequence, Answers]:
        """The last place is the answer."""
        _enough("induction", places, 4, vocab, FIRST + 2)
        sequence = rng.integers(FIRST, vocab, places)
        before = int(rng.integers(0, places - 3))
        sequence[[before, places - 2]] = MARK
        sequence[places - 1] = sequence[before + 1]
        return sequence, np.arange(places) == places - 1


@dataclasses.dataclass(frozen=True)
class Needle:
    """Says again a passage of the upper half of the symbols that lies among many of the lower half.

    Attributes:
      size: tokens of the passage.
      depth: where it lies, from 0, the beginning, to 1, right before the question; None draws it.
    """

    size: int = 4
    depth: float | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UsageError(f"size={self.size} must be at least 1.")
        if self.depth is not None and not 0.0 <= self.depth <= 1.0:
            raise UsageError(f"depth={self.depth} must be between 0 and 1.")

    def make(self, rng: np.random.Generator, places: int, vocab: int) -> tuple[Sequence, Answers]:
        """The last `size` places are answers."""
        _enough("needle", places, 2 * self.size + 3, vocab, FIRST + 2)
        middle = (FIRST + vocab) // 2
        passage = np.concatenate([[MARK], rng.integers(middle, vocab, self.size)])
        hay = rng.integers(FIRST, middle, places - 2 * len(passage))
        drawn = rng.integers(0, len(hay) + 1)
        at = drawn if self.depth is None else round(self.depth * len(hay))
        sequence = np.concatenate([hay[:at], passage, hay[at:], passage])
        return sequence, np.arange(places) >= places - self.size


SINGLE = {"copy": Copy, "recall": Recall, "induction": Induction, "needle": Needle}


@dataclasses.dataclass(frozen=True)
class Mixed:
    """Each sequence asks one of several things, which nothing but the sequence says.

    Attributes:
      tasks: kinds of `SINGLE`, drawn alike often.
    """

    tasks: tuple[Any, ...] = part(SINGLE, default=(Copy(), Recall(), Induction(), Needle()))

    def __post_init__(self) -> None:
        if not self.tasks:
            raise UsageError("mixed needs tasks: name at least one.")

    def make(self, rng: np.random.Generator, places: int, vocab: int) -> tuple[Sequence, Answers]:
        """The answers are those of the task that is drawn."""
        task: Task = self.tasks[int(rng.integers(len(self.tasks)))]
        return task.make(rng, places, vocab)


KINDS = {**SINGLE, "mixed": Mixed}


@dataclasses.dataclass(frozen=True)
class Probe:
    """A source of sequences that ask one thing, in the fields of packed text.

    Attributes:
      length: tokens a row, of which one more is drawn: the last target.
      task: a kind of `KINDS`.
      vocab: tokens there are; at most those of the model.
      examples: sequences of an epoch.
      seed: of all of them; another one for evaluation than for training.
    """

    length: int
    task: Any = part(KINDS)
    vocab: int = 64
    examples: int = 2**16
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("length", "examples"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} must be at least 1.")

    def open(self) -> "ProbeReader":
        """Raises UsageError for a length or a vocabulary that is too small to ask anything."""
        reader = ProbeReader(self)
        _ = reader[0]
        return reader


class ProbeReader:
    """Draws the sequences as they are asked for."""

    def __init__(self, definition: Probe) -> None:
        self.definition = definition
        self.metadata = Metadata(identity=repr(definition))

    def __len__(self) -> int:
        return self.definition.examples

    def __getitem__(self, index: int) -> Example:
        definition = self.definition
        rng = np.random.Generator(np.random.Philox(key=[definition.seed, index]))
        places = definition.length + 1
        drawn, answers = definition.task.make(rng, places, definition.vocab)
        rest = (0, places - len(drawn))
        tokens = np.pad(drawn, rest).astype(np.int32)
        segments = np.pad(np.ones(len(drawn), np.int32), rest)
        return {
            "tokens": tokens[:-1],
            "targets": tokens[1:],
            "segments": segments[:-1],
            "positions": np.arange(definition.length, dtype=np.int32),
            "weights": np.pad(answers, rest)[1:].astype(np.float32),
        }


def _enough(kind: str, places: int, least_places: int, vocab: int, least_vocab: int) -> None:
    if places < least_places:
        raise UsageError(
            f"{kind} needs at least {least_places - 1} tokens, and length={places - 1}: make it longer."
        )
    if vocab < least_vocab:
        raise UsageError(f"{kind} of {places - 1} tokens needs vocab={least_vocab} or more, not {vocab}.")
