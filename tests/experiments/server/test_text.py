import numpy as np
import pytest

from effjax.data.text import Bytes
from experiments.run.server.text import TextStream


def stream(tokens, stops=()):
    text = TextStream(Bytes(), stops)
    pieces = []
    for token in tokens:
        pieces.append(text.push(int(token)))
        if text.stopped:
            return pieces, text
    return [*pieces, text.finish()], text


def test_characters_come_whole():
    pieces, _ = stream("aé€b".encode())
    assert pieces == ["a", "", "é", "", "", "€", "b", ""]


def test_what_is_no_text_comes_in_the_end():
    assert stream([65, 0xE2, 66])[0] == ["A", "", "\ufffdB", ""]
    assert stream([65, 0xE2])[0] == ["A", "", "\ufffd"]


def test_pieces_are_the_text_whatever_the_bytes(draw):
    for size in (1, 7, 300):
        tokens = draw.integers(0, 256, size)
        assert "".join(stream(tokens)[0]) == Bytes().decode(tokens.astype(np.int32))


@pytest.mark.parametrize(
    ("text", "stops", "pieces"),
    [
        ("abcd", ["c"], ["a", "b", ""]),
        ("abcd", ["bc"], ["a", "", ""]),
        ("abxd", ["bc"], ["a", "", "bx", "d", ""]),
        ("aab", ["ab"], ["", "a", ""]),
        ("abab", ["abac"], ["", "", "", "ab", "ab"]),
        ("abcd", ["cd", "bcde"], ["a", "", "", "b"]),
        ("ab", ["ab", "a"], [""]),
        ("abé", ["é"], ["a", "b", "", ""]),
    ],
)
def test_a_stop_string_ends_the_text_and_its_beginning_is_held_back(text, stops, pieces):
    found, told = stream(text.encode(), stops)
    assert found == pieces
    assert told.stopped == any(stop in text for stop in stops)


def test_only_the_last_tokens_are_decoded_again():
    class Counting(Bytes):
        def decode(self, tokens):
            counts.append(len(tokens))
            return super().decode(tokens)

    counts = []
    text = TextStream(Counting())
    for _ in range(500):
        text.push(65)
    assert max(counts) <= 2
