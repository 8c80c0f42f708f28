import numpy as np
import pytest

from effjax.data.text import Bytes, PackedRows, Tokenizer, index_documents
from effjax.errors import UsageError


class Texts:
    def __init__(self, texts: list[str]):
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, bytes]:
        return {"text": self.texts[index].encode()}


# Each document has letters of its own, so that a token says where it came from. One is empty, one is long.
TEXTS = ["ab", "", "cdefghijklmnopqrstuvwxyz", "A", "BCDEFG", "HIJKLMNO", "PQRSTUVWXYZ"]
TOTAL = sum(len(text) + 1 for text in TEXTS)  # 59 with the separators


def packed(length: int, seed: int | None, texts: list[str] = TEXTS) -> PackedRows:
    return PackedRows(index_documents(Texts(texts), Bytes()), length, seed)


def stream(rows: PackedRows, epoch: int) -> np.ndarray:
    """All input tokens of an epoch, and the last target."""
    numbers = range(epoch * len(rows), (epoch + 1) * len(rows))
    taken = [rows.row(number) for number in numbers]
    return np.concatenate([*(row["tokens"] for row in taken), taken[-1]["targets"][-1:]])


def test_bytes_make_a_round_trip() -> None:
    tokenizer = Bytes()
    assert isinstance(tokenizer, Tokenizer)
    text = "naïve – 東京\n\t"
    tokens = tokenizer.encode(text.encode())
    assert tokens.dtype == np.int32
    assert 0 < tokens.min() <= tokens.max() < tokenizer.vocabulary_size == 256
    assert tokenizer.decode(tokens) == text
    assert tokenizer.decode(np.array([0, 104, 0, 105, 255], np.int32)) == "hi\ufffd"
    assert tokenizer.decode(tokenizer.encode(b"a\0b")) == "a b"


@pytest.mark.parametrize("length", [1, 5, 7, 13, TOTAL - 1])
@pytest.mark.parametrize("epoch", [0, 1, 4])
def test_every_token_of_an_epoch_appears_once_up_to_the_tail(length: int, epoch: int) -> None:
    rows = packed(length, seed=3)
    assert len(rows) == (TOTAL - 1) // length
    tokens = stream(rows, epoch)
    assert len(tokens) == len(rows) * length + 1
    # Cut at the separators, the stream is the documents in some order, whole except for the tail.
    pieces = [
        bytes(piece.astype(np.uint8)).decode() for piece in np.split(tokens, np.flatnonzero(tokens == 0))
    ]
    assert pieces[0] == ""
    documents = [piece.lstrip("\0") for piece in pieces[1:]]
    assert len(set(documents[:-1])) == len(documents) - 1
    assert set(documents[:-1]) <= set(TEXTS)
    remaining = set(TEXTS) - set(documents[:-1])
    assert any(text.startswith(documents[-1]) for text in remaining)
    lost = TOTAL - len(tokens)
    assert 0 <= lost < length


def test_each_epoch_has_its_own_order_which_the_seed_decides() -> None:
    rows = packed(7, seed=3)
    orders = [stream(rows, epoch).tobytes() for epoch in range(4)]
    assert len(set(orders)) == 4
    assert orders == [stream(packed(7, seed=3), epoch).tobytes() for epoch in range(4)]
    assert orders[0] != stream(packed(7, seed=4), 0).tobytes()


def test_random_access_equals_reading_in_turn() -> None:
    rows = packed(5, seed=3)
    in_turn = [rows.row(number) for number in range(6 * len(rows))]
    fresh = packed(5, seed=3)
    for number in np.random.Generator(np.random.PCG64(0)).permutation(len(in_turn)):
        again = fresh.row(int(number))
        assert again.keys() == in_turn[number].keys()
        for name, value in again.items():
            np.testing.assert_array_equal(value, in_turn[number][name])


@pytest.mark.parametrize("seed", [None, 3])
def test_rows_say_where_documents_begin_and_end(seed: int | None) -> None:
    rows = packed(7, seed)
    crossed = 0
    for number in range(len(rows)):
        row = rows[number]
        assert {name: value.dtype.name for name, value in row.items()} == {
            "tokens": "int32",
            "targets": "int32",
            "segments": "int32",
            "positions": "int32",
            "weights": "float32",
        }
        assert all(value.shape == (7,) for value in row.values())
        real = row["segments"] > 0
        begins = (row["tokens"] == 0) & real
        begins[0] = True
        np.testing.assert_array_equal(row["segments"], np.where(real, np.cumsum(begins), 0))
        for segment in range(1, row["segments"].max() + 1):
            positions = row["positions"][row["segments"] == segment]
            np.testing.assert_array_equal(positions, np.arange(len(positions)))
        # Within the row, a target is the next token; it counts unless it begins another document.
        np.testing.assert_array_equal(row["targets"][:-1], row["tokens"][1:])
        np.testing.assert_array_equal(row["weights"], (row["targets"] != 0).astype(np.float32))
        crossed += int(((row["weights"] == 0) & real).sum())
    assert crossed >= len(TEXTS) - 2


def test_evaluation_scores_every_target_once() -> None:
    rows = packed(7, seed=None)
    assert len(rows) == -(-(TOTAL - 1) // 7)
    taken = [rows[i] for i in range(len(rows))]
    scored = np.concatenate([row["targets"][row["weights"] == 1] for row in taken])
    assert bytes(scored.astype(np.uint8)).decode() == "".join(TEXTS)
    last = taken[-1]
    assert (last["segments"] == 0).sum() == len(rows) * 7 - TOTAL
    for name in ("tokens", "targets", "positions", "weights"):
        assert (last[name][last["segments"] == 0] == 0).all()


def test_a_row_longer_than_everything_is_padded_or_refused() -> None:
    row = packed(100, seed=None)[0]
    assert (row["segments"] > 0).sum() == TOTAL
    assert row["segments"].max() == len(TEXTS)
    with pytest.raises(UsageError, match=r"have 59 tokens, too few for one row of packing\.length=60"):
        packed(60, seed=0)


def test_packing_needs_text() -> None:
    class Images:
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> dict[str, int]:
            return {"image": 1, "label": 2}

    with pytest.raises(UsageError, match="needs the field 'text'; this source has 'image', 'label'"):
        index_documents(Images(), Bytes())


def test_another_tokenizer_can_be_plugged_in() -> None:
    class Words:
        vocabulary_size = 100
        separator = 99

        def encode(self, text: bytes) -> np.ndarray:
            return np.array([len(word) for word in text.split()], np.int32)

        def decode(self, tokens: np.ndarray) -> str:
            return " ".join("x" * token for token in tokens)

    rows = PackedRows(index_documents(Texts(["a bb", "ccc"]), Words()), 4, None)
    np.testing.assert_array_equal(rows[0]["tokens"], [99, 1, 2, 99])
    np.testing.assert_array_equal(rows[0]["targets"], [1, 2, 99, 3])
    np.testing.assert_array_equal(rows[0]["weights"], [1, 1, 0, 1])
