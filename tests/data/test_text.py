import subprocess
import sys

import numpy as np
import pytest
import tokenizers

from effjax.config import build
from effjax.data import Packing, kept, text
from effjax.errors import UsageError

SEPARATOR = 0
SIZES = [5, 1, 30, 0, 12, 7, 3, 19]


class Corpus:
    """Document d is the byte `65 + d`, as often as `SIZES` says."""

    reads = 0

    def __len__(self):
        return len(SIZES)

    def __getitem__(self, index):
        self.reads += 1
        return {"text": bytes([65 + index]) * SIZES[index]}


def packed(length, seed):
    return text.PackedRows(text.index_documents(Corpus(), text.Bytes()), length, seed)


def stream(order):
    return np.concatenate([[SEPARATOR, *[65 + d] * SIZES[d]] for d in order])


@pytest.mark.parametrize("length", [1, 4, 11, 16])
@pytest.mark.parametrize("epoch", [0, 1])
def test_training_cuts_the_stream_of_an_epoch(length, epoch):
    rows = packed(length, seed=2)
    order = rows._order.of(epoch)
    assert sorted(order) == list(range(len(SIZES)))
    whole = stream(order)
    assert len(rows) == (len(whole) - 1) // length
    got = [rows.row(epoch * len(rows) + r) for r in range(len(rows))]
    tokens = np.concatenate([row["tokens"] for row in got])
    targets = np.concatenate([row["targets"] for row in got])
    np.testing.assert_array_equal(tokens, whole[: len(tokens)])
    np.testing.assert_array_equal(targets, whole[1 : len(tokens) + 1])
    assert len(whole) - 1 - len(tokens) < length  # what is lost is less than a row


@pytest.mark.parametrize("length", [4, 11])
def test_borders(length):
    rows = packed(length, seed=2)
    for number in range(3 * len(rows)):
        row = rows.row(number)
        starts = np.flatnonzero(row["tokens"] == SEPARATOR)
        segments = np.cumsum(row["tokens"] == SEPARATOR) + (row["tokens"][0] != SEPARATOR)
        np.testing.assert_array_equal(row["segments"], segments)
        begins = np.unique([0, *starts])
        expected = np.arange(length) - begins[np.searchsorted(begins, np.arange(length), "right") - 1]
        np.testing.assert_array_equal(row["positions"], expected)
        np.testing.assert_array_equal(row["weights"], np.ones(length, np.float32))
        assert {name: str(v.dtype) for name, v in row.items()} == {
            "tokens": "int32", "targets": "int32", "segments": "int32", "positions": "int32",
            "weights": "float32",
        }  # fmt: skip


def test_epochs_take_other_orders_and_random_access_is_sequential():
    rows = packed(8, seed=5)
    numbers = np.arange(4 * len(rows))
    sequential = [rows.row(int(n)) for n in numbers]
    fresh = packed(8, seed=5)
    for n in np.random.default_rng(0).permutation(numbers):
        for name, value in fresh.row(int(n)).items():
            np.testing.assert_array_equal(value, sequential[n][name])
    assert len({tuple(rows._order.of(epoch)) for epoch in range(4)}) == 4


@pytest.mark.parametrize("length", [4, 11, 1000])
def test_evaluation_scores_every_target_once_in_order(length):
    rows = packed(length, seed=None)
    got = [rows[r] for r in range(len(rows))]
    weights = np.concatenate([row["weights"] for row in got])
    targets = np.concatenate([row["targets"] for row in got])[weights > 0]
    whole = stream(range(len(SIZES)))
    np.testing.assert_array_equal(targets, whole[1:])
    segments = np.concatenate([row["segments"] for row in got])
    assert (segments > 0).sum() in (len(whole) - 1, len(whole))  # all but the last token, which has no target


def test_too_little_text():
    with pytest.raises(
        UsageError, match=r"together have 85 tokens, too few for one row of packing\.length=85"
    ):
        packed(85, seed=0)
    assert len(packed(84, seed=0)) == 1


def test_a_source_without_text():
    with pytest.raises(UsageError, match="needs the field 'text'; this source has 'label'"):
        text.index_documents([{"label": 1}], text.Bytes())


def test_bytes():
    tokenizer = text.Bytes()
    assert tokenizer.encode(b"a\0b").tolist() == [97, 32, 98]
    assert tokenizer.decode(np.array([0, *"é!".encode(), 0xC3], np.int32)) == "é!\ufffd"
    assert tokenizer.decode(np.array([97, 256 + 98, 99], np.int32)) == "ac"
    assert max(tokenizer.encode(bytes(range(256)))) < tokenizer.vocabulary_size == 256


# The index on disk


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "FOLDER", tmp_path / "index")
    return tmp_path / "index"


def test_a_separator_is_a_byte_too():
    documents = text.index_documents(Corpus(), text.Bytes())
    np.testing.assert_array_equal(documents.sizes, documents.lengths)


def test_lengths_are_measured_once(folder):
    first, second, other = Corpus(), Corpus(), Corpus()
    lengths = text.index_documents(first, text.Bytes(), "corpus", worth_keeping=0.0).lengths
    assert lengths.tolist() == [size + 1 for size in SIZES]
    again = text.index_documents(second, text.Bytes(), "corpus", worth_keeping=0.0).lengths
    np.testing.assert_array_equal(again, lengths)
    assert first.reads > len(SIZES)
    assert second.reads == 1  # only to see that there is text
    text.index_documents(other, text.Bytes(), "another corpus", worth_keeping=0.0)
    assert other.reads > len(SIZES)
    assert len(list(folder.iterdir())) == 2
    assert not list(folder.glob("*.partial"))


def test_what_is_quick_or_unknown_leaves_nothing(folder):
    text.index_documents(Corpus(), text.Bytes(), "corpus")
    text.index_documents(Corpus(), text.Bytes(), "", worth_keeping=0.0)
    assert not folder.exists()


@pytest.mark.parametrize("damage", [b"", b"junk", b"\x93NUMPY"])
def test_a_damaged_index_is_made_again(folder, damage):
    expected = kept.kept("key", lambda: np.arange(5), 0.0)
    (file,) = folder.iterdir()
    file.write_bytes(damage)
    np.testing.assert_array_equal(kept.kept("key", lambda: np.arange(5), 0.0), expected)
    np.testing.assert_array_equal(kept.kept("key", lambda: pytest.fail("it was repaired"), 0.0), expected)


def test_a_folder_that_cannot_be_written_costs_only_time(folder):
    folder.parent.joinpath("index").touch()
    np.testing.assert_array_equal(kept.kept("key", lambda: np.arange(5), 0.0), np.arange(5))


# tokenizer.json


def write(path, special=("<|endoftext|>",), **options):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(special),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat and the dog and the hat"] * 9, trainer)
    tokenizer.enable_truncation(3)  # as many published files have it
    tokenizer.save(str(path))
    return str(path)


def test_tokenizer_file(tmp_path):
    section = dict(length=8, tokenizer=dict(kind="tokenizer_file", path=write(tmp_path / "tokenizer.json")))
    tokenizer = build(Packing, section, "config.data.packing").tokenizer
    assert isinstance(tokenizer, text.Tokenizer)
    said = "the cat and the café said <|endoftext|>"
    tokens = tokenizer.encode(said.encode())
    assert 3 < len(tokens) < len(said)  # neither cut nor bytes
    assert tokenizer.separator not in tokens  # although the text names it
    assert tokens.max() < tokenizer.vocabulary_size
    assert tokenizer.decode(np.array([tokenizer.separator, *tokens], np.int32)) == said
    assert tokenizer.decode(np.array([10**6], np.int32)) == ""


def test_separators_and_identity(tmp_path):
    several = write(tmp_path / "a.json", special=("<pad>", "</s>", "<|begin_of_text|>"))
    assert text.TokenizerFile(several).separator == 2
    assert text.TokenizerFile(several, "<pad>").separator == 0
    strange = write(tmp_path / "b.json", special=("<end>",))
    with pytest.raises(
        UsageError, match=r"no token .*</s> to separate documents: set separator_token.*'<end>'"
    ):
        _ = text.TokenizerFile(strange).separator
    identities = {text.TokenizerFile(several).identity, text.TokenizerFile(several, "<pad>").identity}
    identities |= {text.TokenizerFile(strange, "<end>").identity, text.Bytes().identity}
    assert len(identities) == 4


def test_files_that_are_no_tokenizer(tmp_path):
    with pytest.raises(UsageError, match=r"none\.json does not exist"):
        _ = text.TokenizerFile(str(tmp_path / "none.json")).vocabulary_size
    (tmp_path / "odd.json").write_text("{}")
    with pytest.raises(UsageError, match=r"odd\.json is no tokenizer\.json"):
        _ = text.TokenizerFile(str(tmp_path / "odd.json")).vocabulary_size


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UsageError, match=r"pip install 'effjax\[text\]'"):
        text.TokenizerFile(str(tmp_path / "tokenizer.json")).encode(b"a")


def test_importing_the_room_imports_neither_tokenizers_nor_tensorflow():
    code = "import sys, effjax.data; assert not {'tokenizers', 'tensorflow', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
