"""Text: a byte tokenizer, and documents packed into rows of one length."""

import dataclasses
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32, Int64

from effjax.data.order import EpochOrder
from effjax.data.records import Example, Examples
from effjax.errors import UsageError


@runtime_checkable
class Tokenizer(Protocol):
    """Text to numbers and back. Any tokenizer with these four members can be named in a config."""

    @property
    def vocabulary_size(self) -> int:
        """How many tokens there are."""

    @property
    def separator(self) -> int:
        """The token that begins each document."""

    def encode(self, text: bytes) -> Int32[np.ndarray, "tokens"]:
        """UTF-8 to tokens, without a separator."""

    def decode(self, tokens: Int32[np.ndarray, "tokens"]) -> str:
        """Tokens to text; separators vanish."""


@dataclasses.dataclass(frozen=True)
class Bytes:
    """Each byte of UTF-8 is its own token; 0, which no text holds, separates documents."""

    vocabulary_size: int = dataclasses.field(default=256, init=False)
    separator: int = dataclasses.field(default=0, init=False)

    def encode(self, text: bytes) -> Int32[np.ndarray, "tokens"]:
        """A zero byte, should there be one, becomes a space."""
        return np.frombuffer(text.replace(b"\0", b" "), np.uint8).astype(np.int32)

    def decode(self, tokens: Int32[np.ndarray, "tokens"]) -> str:
        """What is no UTF-8 (a model may say anything) becomes the replacement character."""
        return tokens[tokens != 0].astype(np.uint8).tobytes().decode(errors="replace")


KINDS = {"bytes": Bytes}


@dataclasses.dataclass(frozen=True)
class Documents:
    """Documents of known length in tokens, separator included."""

    source: Examples
    tokenizer: Tokenizer
    lengths: Int64[np.ndarray, "documents"]

    def tokens(self, number: int) -> Int32[np.ndarray, "tokens"]:
        """Returns the separator and the tokens of one document."""
        text = self.source[number]["text"]
        return np.concatenate([[self.tokenizer.separator], self.tokenizer.encode(text)]).astype(np.int32)


def index_documents(source: Examples, tokenizer: Tokenizer) -> Documents:
    """Measures every document once; only the lengths are kept.

    Raises:
      UsageError: if the examples have no field `text`.
    """
    if "text" not in source[0]:
        raise UsageError(
            f"Packing needs the field 'text'; this source has {', '.join(map(repr, source[0]))}."
        )
    lengths = [1 + len(tokenizer.encode(source[number]["text"])) for number in range(len(source))]
    return Documents(source, tokenizer, np.array(lengths, np.int64))


class PackedRows:
    """The stream of all documents of an epoch, cut into rows.

    With the stream `s` of an epoch, row r has, for t in 0..T-1 and p = r T + t:
      tokens `s[p]` and targets `s[p + 1]`, `[T]` int32.
      segments `[T]` int32: which document of the row a token belongs to, from 1; 0 is padding.
      positions `[T]` int32: place in the document, or in its part where a row begins within one.
      weights `[T]` float32: 0 where the target belongs to another document or is padding, otherwise 1.

    Training (`seed` set) takes a new order of the documents each epoch and drops the tail that fills no row.
    Evaluation (`seed` None) takes the given order and pads the tail, so that every target is scored once.

    Args:
      documents: what `index_documents` returns.
      length: T.
      seed: of the run, or None.
    """

    def __init__(self, documents: Documents, length: int, seed: int | None):
        self._documents = documents
        self._length = length
        self._order = EpochOrder(len(documents.lengths), seed, documents.lengths)
        self._total = int(documents.lengths.sum())
        targets = self._total - 1
        self._rows = targets // length if seed is not None else -(-targets // length)
        if self._rows < 1:
            raise UsageError(
                f"All documents together have {self._total} tokens, too few for one row of "
                f"packing.length={length}."
            )

    def __len__(self) -> int:
        """Rows in one epoch."""
        return self._rows

    def __getitem__(self, index: int) -> Example:
        """A row of the first epoch."""
        return self.row(index)

    def row(self, number: int) -> Example:
        """Returns the row behind a global number, whichever epoch that is in."""
        epoch, row = divmod(number, self._rows)
        order, starts = self._order.of(epoch), self._order.starts(epoch)
        begin = row * self._length
        end = min(begin + self._length + 1, self._total)

        tokens, segments, positions = np.zeros((3, self._length + 1), np.int32)
        place = int(np.searchsorted(starts, begin, side="right")) - 1
        filled, segment = 0, 0
        while begin + filled < end:
            offset = begin + filled - int(starts[place])
            piece = self._documents.tokens(int(order[place]))[offset : offset + end - begin - filled]
            span = slice(filled, filled + len(piece))
            segment += 1
            tokens[span], segments[span], positions[span] = piece, segment, np.arange(len(piece))
            filled, place = filled + len(piece), place + 1

        same_document = (segments[1:] == segments[:-1]) & (segments[1:] > 0)
        return {
            "tokens": tokens[:-1],
            "targets": tokens[1:],
            "segments": segments[:-1],
            "positions": positions[:-1],
            "weights": same_document.astype(np.float32),
        }
