import dataclasses

import numpy as np
import pytest

from effjax.config import build
from effjax.data import Data, text
from effjax.data.chosen import best, difference, log_likelihoods, read_scores, write_scores
from effjax.errors import RunError, UsageError

SIZES = [5, 1, 30, 0, 12, 7, 3, 19]


class Corpus:
    """Document d is the byte `65 + d`, as often as `SIZES` says."""

    def __len__(self):
        return len(SIZES)

    def __getitem__(self, index):
        return {"text": bytes([65 + index]) * SIZES[index]}


@pytest.fixture
def corpus(tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text("".join(f'{{"text": "document {d} {"x" * size}"}}\n' for d, size in enumerate(SIZES)))
    return dict(kind="jsonl", path=str(file))


def opened(corpus, **fields):
    source = dict(kind="chosen", source=corpus) | fields
    return build(Data, dict(source=source, batch_size=1, packing=dict(length=8)), "config.data").open()


@pytest.mark.parametrize("length", [3, 8, 64])
def test_every_token_is_counted_for_its_document(length):
    """A model for which a token costs its own number: a document costs its bytes, and the separator 0."""
    documents = text.index_documents(Corpus(), text.Bytes())
    found = log_likelihoods(documents, length, 2, lambda batch: batch["targets"].astype(np.float32))
    np.testing.assert_array_equal(found, [-(65 + d) * size for d, size in enumerate(SIZES)])
    ends = log_likelihoods(documents, length, 2, lambda batch: (batch["targets"] == 0).astype(np.float32))
    np.testing.assert_array_equal(ends, [-1] * (len(SIZES) - 1) + [0])


def test_the_score_is_what_the_large_model_knows_more_a_byte():
    large, small, sizes = np.array([-4.0, -9.0]), np.array([-8.0, -9.0]), np.array([2, 3])
    np.testing.assert_array_equal(difference(large, small, sizes), [2, 0])
    np.testing.assert_array_equal(difference(small, small, sizes), 0)
    with pytest.raises(RunError, match="large model gives document 1"):
        difference(np.array([-1.0, -np.inf]), small, sizes)


def test_the_best_half_of_the_bytes_is_kept(draw):
    scores, sizes = draw.normal(size=50), draw.integers(1, 30, 50)
    kept = best(scores, sizes, 0.5)
    left = np.setdiff1d(np.arange(50), kept)
    assert scores[kept].min() > scores[left].max()
    total = sizes[kept].sum()
    assert 0.5 * sizes.sum() <= total < 0.5 * sizes.sum() + sizes.max()
    np.testing.assert_array_equal(best(scores + 7.0, sizes, 0.5), kept)
    np.testing.assert_array_equal(best(scores, sizes, 1.0), np.arange(50))
    assert np.all(np.diff(kept) > 0)


def test_a_source_of_chosen_documents(corpus, tmp_path):
    scores = tmp_path / "scores.npz"
    sizes = np.full(8, 10)
    write_scores(scores, np.array([0.0, 7, 1, 6, 2, 5, 3, 4]), sizes, dict(of="a test"))
    np.testing.assert_array_equal(read_scores(scores)[1], sizes)
    data = opened(corpus, scores=str(scores), share=0.4)
    names = [data._examples[i]["text"].split()[1] for i in range(4)]
    assert names == [b"1", b"3", b"5", b"7"]
    whole = opened(corpus, scores=str(scores), share=1.0)
    assert whole.metadata.identity != data.metadata.identity
    plain = build(Data, dict(source=corpus, batch_size=1, packing=dict(length=8)), "config.data").open()
    for ours, theirs in zip(range(3), range(3), strict=True):
        np.testing.assert_array_equal(whole._rows.row(ours)["tokens"], plain._rows.row(theirs)["tokens"])
    drawn = opened(corpus, scores=str(scores), share=0.4, drawn=1)
    again = opened(corpus, scores=str(scores), share=0.4, drawn=1)
    assert len(drawn._examples) == 4
    assert drawn.metadata.identity == again.metadata.identity != data.metadata.identity


def test_bad_scores_are_refused(corpus, tmp_path):
    scores = tmp_path / "scores.npz"
    with pytest.raises(UsageError, match=r"experiments\.score_text"):
        opened(corpus, scores=str(scores))
    scores.write_bytes(b"something else")
    with pytest.raises(UsageError, match="no file of scores"):
        opened(corpus, scores=str(scores))
    scores.unlink()
    write_scores(scores, np.zeros(3), np.ones(3, int), {})
    with pytest.raises(UsageError, match="scores 3 documents and the source has 8"):
        opened(corpus, scores=str(scores))
    with pytest.raises(UsageError, match="share=0"):
        opened(corpus, scores=str(scores), share=0.0)
    with pytest.raises(FileExistsError):
        write_scores(scores, np.zeros(3), np.ones(3, int), {})


def test_equal_scores_keep_the_first():
    assert best(np.zeros(4), np.ones(4, int), 0.5).tolist() == [0, 1]


def test_the_definition_is_plain_data(corpus):
    data = build(Data, dict(source=dict(kind="chosen", source=corpus, scores="a"), batch_size=1), "data")
    assert dataclasses.asdict(data)["source"]["source"]["path"] == corpus["path"]
