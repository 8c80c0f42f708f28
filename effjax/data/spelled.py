"""Pictures and their names as one text: two modalities in one stream of bytes.

A document is the name of a picture in letters and its pixels, row by row, as bytes from 128 on. Every second
one shows first and tells then, so that a language model on them learns to draw and to read.
"""

import dataclasses

import numpy as np

from effjax.data.records import Example, Examples, Metadata
from effjax.errors import UsageError

# Bytes from here on are pixels; those below are letters.
FIRST_PIXEL = 128


@dataclasses.dataclass(frozen=True)
class SpelledPictures:
    """A data set with `image` and `label`, as texts.

    Args:
      name: of the data set, as for the source `tfds`.
      split: with slices.
      data_dir: None is where `tfds` looks.
      levels: how many brightnesses there are, at most 128.
      words: the name of each class; empty takes those that the data set has.
    """

    name: str = "digits"
    split: str = "train"
    data_dir: str | None = None
    levels: int = 16
    words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 2 <= self.levels <= 128:
            raise UsageError(f"levels={self.levels} must be from 2 to 128: a pixel is one byte.")

    def open(self) -> "SpelledReader":
        """Raises UsageError for a data set that is not there, or has more classes than words."""
        from effjax.data.sources import Tfds  # it lists this source among its own

        reader = Tfds(self.name, self.split, self.data_dir, ("image", "label")).open()
        words = self.words or reader.metadata.class_names
        if len(words) < len(reader.metadata.class_names):
            raise UsageError(
                f"{len(words)} words do not name the {len(reader.metadata.class_names)} classes of "
                f"{self.name}."
            )
        identity = f"{reader.metadata.identity} as text: {self.levels} levels, {words}"
        return SpelledReader(reader, words, self.levels, Metadata(identity=identity))


class SpelledReader:
    """Pictures read as texts."""

    def __init__(self, source: Examples, words: tuple[str, ...], levels: int, metadata: Metadata):
        self._source, self._words, self._levels = source, words, levels
        self.metadata = metadata

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        example = self._source[index]
        word = self._words[int(example["label"])].encode()
        brightness = np.round(example["image"].astype(np.float32) * ((self._levels - 1) / 255))
        pixels = (FIRST_PIXEL + brightness).astype(np.uint8).tobytes()
        return {"text": pixels + word if index % 2 else word + pixels}
