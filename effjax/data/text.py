"""Text: tokenizers, and documents packed into rows of one length."""

import array
import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32, Int64

from effjax.data.kept import WORTH_KEEPING, kept
from effjax.data.order import EpochOrder
from effjax.data.records import Example, Examples
from effjax.errors import UsageError, did_you_mean


@runtime_checkable
class Tokenizer(Protocol):
    """Text to numbers and back. Any tokenizer with these members can be named in a config."""

    @property
    def vocabulary_size(self) -> int:
        """How many tokens there are."""

    @property
    def separator(self) -> int:
        """The token that begins each document."""

    @property
    def identity(self) -> str:
        """A text that changes when `encode` does."""

    def encode(self, text: bytes) -> Int32[np.ndarray, "tokens"]:
        """UTF-8 to tokens, without a separator."""

    def decode(self, tokens: Int32[np.ndarray, "tokens"]) -> str:
        """Tokens to text; separators vanish."""


@dataclasses.dataclass(frozen=True)
class Bytes:
    """Each byte of UTF-8 is its own token; 0, which no text holds, separates documents."""

    vocabulary_size: int = dataclasses.field(default=256, init=False)
    separator: int = dataclasses.field(default=0, init=False)
    identity: str = dataclasses.field(default="bytes", init=False)

    def encode(self, text: bytes) -> Int32[np.ndarray, "tokens"]:
        """A zero byte, should there be one, becomes a space."""
        return np.frombuffer(text.replace(b"\0", b" "), np.uint8).astype(np.int32)

    def decode(self, tokens: Int32[np.ndarray, "tokens"]) -> str:
        """Numbers that are no byte vanish; what is no UTF-8 becomes the replacement character."""
        return tokens[(tokens > 0) & (tokens < 256)].astype(np.uint8).tobytes().decode(errors="replace")


SEPARATOR_TOKENS = ("<|endoftext|>", "<|begin_of_text|>", "</s>")


@dataclasses.dataclass(frozen=True)
class TokenizerFile:
    """A `tokenizer.json` as Hugging Face's tokenizers write it, read by the package of that name.

    Args:
      path: the file.
      separator_token: the special token that begins each document; None takes the first of
        `SEPARATOR_TOKENS` that the file has.
    """

    path: str
    separator_token: str | None = None

    @functools.cached_property
    def vocabulary_size(self) -> int:
        """One more than the largest token; numbers without a token count."""
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    @functools.cached_property
    def separator(self) -> int:
        """Raises UsageError if the file has no such token."""
        wanted = SEPARATOR_TOKENS if self.separator_token is None else (self.separator_token,)
        for name in wanted:
            number = self._tokenizer.token_to_id(name)
            if number is not None:
                return number
        special = [t.content for t in self._tokenizer.get_added_tokens_decoder().values() if t.special]
        raise UsageError(
            f"The tokenizer {self.path} has no token {' or '.join(wanted)} to separate documents: set "
            f"separator_token. {did_you_mean(wanted[0], special)}"
        )

    @functools.cached_property
    def identity(self) -> str:
        """The hash of the file."""
        return f"{hashlib.sha256(self._file).hexdigest()}, separator {self.separator}"

    def encode(self, text: bytes) -> Int32[np.ndarray, "tokens"]:
        """Neither truncates nor adds; the name of a special token within a text is text."""
        found = self._tokenizer.encode(text.decode(errors="replace"), add_special_tokens=False)
        return np.array(found.ids, np.int32)

    def decode(self, tokens: Int32[np.ndarray, "tokens"]) -> str:
        """Special tokens, and numbers that are no token, vanish."""
        return self._tokenizer.decode(tokens[tokens != self.separator].tolist(), skip_special_tokens=True)

    @functools.cached_property
    def _file(self) -> bytes:
        path = Path(self.path).expanduser()
        if not path.is_file():
            raise UsageError(f"The tokenizer file {path} does not exist. Name a tokenizer.json by path.")
        return path.read_bytes()

    @functools.cached_property
    def _tokenizer(self) -> Any:
        try:
            import tokenizers  # an optional extra
        except ImportError:
            raise UsageError(
                f"The tokenizer {self.path} needs the package tokenizers: pip install 'effjax[text]'."
            ) from None
        try:
            tokenizer = tokenizers.Tokenizer.from_buffer(self._file)
        except ValueError as error:
            raise UsageError(f"{self.path} is no tokenizer.json: {error}") from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # a document that quotes a separator does not end there
        return tokenizer


KINDS = {"bytes": Bytes, "tokenizer_file": TokenizerFile}


def check_vocabulary(tokenizer: Tokenizer, vocabulary: int) -> None:
    """Refuses a tokenizer with tokens that a model of so many does not have.

    A model may have more: tables are made larger so that they divide well, and for tokens that are no text.

    Raises:
      UsageError: naming both sizes.
    """
    if tokenizer.vocabulary_size > vocabulary:
        raise UsageError(
            f"the tokenizer has {tokenizer.vocabulary_size} tokens and the model {vocabulary}: take the "
            f"tokenizer of its weights, or train a model with vocab={tokenizer.vocabulary_size}."
        )


@dataclasses.dataclass(frozen=True)
class Documents:
    """Documents of known length.

    Attributes:
      source: where they come from.
      tokenizer: what turns them into tokens.
      lengths: of each in tokens, separator included.
      sizes: of each in bytes; the separator counts as one, as what ends a document in a file would.
    """

    source: Examples
    tokenizer: Tokenizer
    lengths: Int64[np.ndarray, "documents"]
    sizes: Int64[np.ndarray, "documents"]

    def tokens(self, number: int) -> Int32[np.ndarray, "tokens"]:
        """Returns the separator and the tokens of one document."""
        text = self.source[number]["text"]
        return np.concatenate([[self.tokenizer.separator], self.tokenizer.encode(text)]).astype(np.int32)


def index_documents(
    source: Examples, tokenizer: Tokenizer, identity: str = "", worth_keeping: float = WORTH_KEEPING
) -> Documents:
    """Measures every document; only the lengths are kept, in memory and, where it took long, on disk.

    A million documents of 400 bytes take about one minute as bytes and six minutes through a byte-level BPE
    on one core, once; then 16 MB are read at each start.

    Args:
      source: examples with a field `text`.
      tokenizer: what measures them.
      identity: `Metadata.identity` of the source; where it is empty nothing is kept on disk.
      worth_keeping: how many seconds it must have taken for the lengths to be kept on disk.

    Raises:
      UsageError: if the examples have no field `text`.
    """
    if "text" not in source[0]:
        raise UsageError(
            f"Packing needs the field 'text'; this source has {', '.join(map(repr, source[0]))}."
        )

    def measure() -> Int64[np.ndarray, "documents 2"]:
        sizes = array.array("q")
        for number in range(len(source)):
            text = source[number]["text"]
            sizes.extend((1 + len(tokenizer.encode(text)), 1 + len(text)))
        return np.array(sizes, np.int64).reshape(-1, 2)

    key = f"tokens and bytes of {len(source)} documents by {tokenizer.identity}; {identity}"
    measured = kept(key, measure, worth_keeping) if identity else measure()
    return Documents(source, tokenizer, measured[:, 0], measured[:, 1])


class PackedRows:
    """The stream of all documents of an epoch, cut into rows.

    With the stream `s` of an epoch, row r has, for t in 0..T-1 and p = r T + t:
      tokens `s[p]` and targets `s[p + 1]`, `[T]` int32.
      segments `[T]` int32: which document of the row a token belongs to, from 1; 0 is padding.
      positions `[T]` int32: place in the document, or in its part where a row begins within one.
      weights `[T]` float32: 0 where the target is padding, otherwise 1.

    Training (`seed` set) takes a new order of the documents each epoch and drops the tail that fills no row.
    Evaluation (`seed` None) takes the given order and pads the tail, so that every target is scored once.

    Args:
      documents: what `index_documents` returns.
      length: T.
      seed: of the run, or None.
    """

    def __init__(self, documents: Documents, length: int, seed: int | None):
        # A row begins where the one before it ended, so what is long is not tokenised again for each row.
        self._tokens = functools.lru_cache(maxsize=16)(documents.tokens)
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
            piece = self._tokens(int(order[place]))[offset : offset + end - begin - filled]
            span = slice(filled, filled + len(piece))
            segment += 1
            tokens[span], segments[span], positions[span] = piece, segment, np.arange(len(piece))
            filled, place = filled + len(piece), place + 1

        return _row(tokens, segments, positions)


def blank_row(length: int) -> Example:
    """A row of padding, which has the shapes and types of every other."""
    return _row(*np.zeros((3, length + 1), np.int32))


def _row(
    tokens: Int32[np.ndarray, "length"],
    segments: Int32[np.ndarray, "length"],
    positions: Int32[np.ndarray, "length"],
) -> Example:
    """What a model is shown of `T + 1` places of the stream."""
    return {
        "tokens": tokens[:-1],
        "targets": tokens[1:],
        "segments": segments[:-1],
        "positions": positions[:-1],
        # The separator that begins the next document is a target too: it is how a model learns to end.
        "weights": (segments[1:] > 0).astype(np.float32),
    }
