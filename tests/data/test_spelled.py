"""Pictures and their names as one text."""

import numpy as np
import pytest

from effjax.data.sources import Tfds
from effjax.data.spelled import FIRST_PIXEL, SpelledPictures
from effjax.errors import UsageError

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def test_a_text_is_a_name_and_a_picture_in_turn():
    texts, pictures = SpelledPictures(words=WORDS, split="test").open(), Tfds("digits", "test").open()
    assert len(texts) == len(pictures) == 360
    for index in (0, 1, 7, 358):
        text, picture = texts[index]["text"], pictures[index]
        word = WORDS[picture["label"]].encode()
        shown = text[: -len(word)] if index % 2 else text[len(word) :]
        assert text == (shown + word if index % 2 else word + shown)
        assert len(shown) == 64
        levels = np.frombuffer(shown, np.uint8).astype(int) - FIRST_PIXEL
        np.testing.assert_array_equal(levels, np.round(picture["image"].ravel() / 17))


def test_classes_have_their_own_names_and_texts_an_identity():
    reader = SpelledPictures(split="test").open()
    assert reader[0]["text"][:1].isdigit()
    assert "16 levels" in reader.metadata.identity


def test_bad_requests_are_named():
    with pytest.raises(UsageError, match="levels=200 must be from 2 to 128"):
        SpelledPictures(levels=200)
    with pytest.raises(UsageError, match="2 words do not name the 10 classes"):
        SpelledPictures(words=("a", "b")).open()
