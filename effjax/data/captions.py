"""Text features of the integers that an embedded data set knows about a picture.

They stand in for those of a frozen text encoder: a network conditioned on text reads one or the other in the
same field, `text` `[L, D]`. A real run reads features that were computed before, from a data set whose field
`text` they are.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from effjax.data.records import Example
from effjax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class OneHotText:
    """One word an integer: word `k` is row `k` of the identity matrix, and no word is zeros.

    Args:
      words: how many there are, the width of the features.
      source: the field of integers: a scalar is one word, `[M]` are `M`.
      no_word: the integer that means no word; None where all are words.
      length: tokens of the text, zeros behind its words; None means as many as the field has integers.
    """

    words: int
    source: str = "label"
    no_word: int | None = None
    length: int | None = None
    random: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.words < 1:
            raise UsageError(f"words={self.words} must be at least 1.")

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns the example with `text` `[L, words]` float32.

        Raises:
          UsageError: for a field that is not there, an integer without a word, or more than `length`.
        """
        if self.source not in example:
            raise UsageError(
                f"one_hot_text reads the field {self.source!r}; an example here has "
                f"{', '.join(map(repr, example))}. Name one as source."
            )
        numbers = np.atleast_1d(example[self.source])  # [M]
        length = len(numbers) if self.length is None else self.length
        if len(numbers) > length:
            raise UsageError(f"{len(numbers)} words of {self.source!r} do not fit in length={length}.")
        text = np.zeros((length, self.words), np.float32)
        for place, number in enumerate(numbers):
            if number == self.no_word:
                continue
            if not 0 <= number < self.words:
                raise UsageError(
                    f"{self.source!r} holds {number}, and one_hot_text has the words 0 to {self.words - 1}: "
                    "make words greater, or say which number means no word in no_word."
                )
            text[place, number] = 1.0
        return example | {"text": text}
