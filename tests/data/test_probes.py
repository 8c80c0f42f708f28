import numpy as np
import pytest

from effjax.config import build
from effjax.data import Data, sources
from effjax.data.probes import FIRST, KINDS, MARK, Copy, Induction, Needle, Part, Probe, ProbeMixture, Recall
from effjax.errors import UsageError

ALL = {"copy": Copy(), "recall": Recall(), "induction": Induction(), "needle": Needle()}


def rows(task, length=21, vocab=16, count=40, seed=0):
    reader = Probe(length, task, vocab=vocab, examples=count, seed=seed).open()
    return [reader[i] for i in range(len(reader))]


def answered(task, tokens, at):
    """What a reader who looks back says to the token at `at`, by the definition of each task."""
    seen = tokens[: at + 1].tolist()
    if isinstance(task, Recall):
        return seen[seen.index(seen[-1]) + 1]
    if isinstance(task, Induction):
        return seen[seen.index(MARK) + 1]
    if isinstance(task, Needle):
        asked = len(seen) - 1 - seen[::-1].index(MARK)
        return seen[seen.index(MARK) + 1 + at - asked]
    return seen[at - seen.index(MARK)]


@pytest.mark.parametrize("length", [21, 32])
@pytest.mark.parametrize("kind", ALL)
def test_answers_are_what_stood_before_and_alone_have_weight(kind, length):
    task = ALL[kind]
    counts = {"copy": length // 2, "recall": (length + 1) // 2 - (length + 1) // 4}
    counts |= {"induction": 1, "needle": 4}
    for row in rows(task, length, vocab=24):
        assert row["tokens"].shape == row["targets"].shape == row["weights"].shape == (length,)
        np.testing.assert_array_equal(row["tokens"][1:], row["targets"][:-1])
        np.testing.assert_array_equal(row["positions"], np.arange(length))
        assert row["targets"].max() < 24
        at = np.flatnonzero(row["weights"])
        assert len(at) == counts[kind]
        assert [answered(task, row["tokens"], i) for i in at] == row["targets"][at].tolist()
        assert np.all(row["segments"][at] == 1)


def test_what_is_not_asked_cannot_be_known():
    drawn = np.stack([row["targets"] for row in rows(Induction(), count=2000)])
    at_the_end = np.bincount(drawn[:, -1], minlength=16)[FIRST:] / 2000
    np.testing.assert_allclose(at_the_end, 1 / 14, atol=0.025)


def test_keys_differ_and_values_are_other_symbols():
    for row in rows(Recall(pairs=3), length=15, vocab=12):
        sequence = np.append(row["tokens"], row["targets"][-1])
        assert len({*sequence[:6:2]}) == 3
        assert sequence[::2].max() < 7 <= sequence[1::2].min()
        assert {*sequence[6::2]} <= {*sequence[:6:2]}


def test_a_needle_lies_where_it_is_put():
    for depth, at in ((0.0, 0), (0.5, 7), (1.0, 14)):
        for row in rows(Needle(size=3, depth=depth)):
            assert row["tokens"].tolist().index(MARK) == at


def test_rows_are_functions_of_seed_and_number():
    first, again, other = rows(Copy()), rows(Copy()), rows(Copy(), seed=1)
    np.testing.assert_array_equal([r["tokens"] for r in first], [r["tokens"] for r in again])
    assert len({tuple(r["tokens"]) for r in [*first, *other]}) == 80


def test_a_config_names_them_for_training_and_evaluation():
    section = dict(kind="probe", task=dict(kind="needle", size=2), length=16, vocab=12, examples=10)
    data = build(Data, dict(source=section, batch_size=4, threads=0), "config.data").open()
    assert next(data.train())["weights"].sum() == 8
    assert sum(batch["mask"].sum() for batch in data.evaluate()) == 10
    assert data.tokenizer is data.bytes_per_token is None
    assert {*KINDS} == {*ALL}
    assert sources.KINDS["probe"] is Probe
    assert sources.KINDS["probe_mixture"] is ProbeMixture


def after_longest_end(seen):
    """What followed the longest end of `seen` that stood before, found without knowing what is asked."""
    for size in range(len(seen) - 1, 0, -1):
        for at in range(len(seen) - size - 1, -1, -1):
            if seen[at : at + size] == seen[-size:]:
                return seen[at + size]
    return None


def test_one_rule_answers_needle_recall_and_induction():
    mixture = ProbeMixture(25, tuple(map(Part, (Needle(), Recall(), Induction()))), vocab=24, examples=40)
    reader = mixture.open()
    for row in (reader[i] for i in range(len(reader))):
        for at in np.flatnonzero(row["weights"]):
            assert after_longest_end(row["tokens"][: at + 1].tolist()) == row["targets"][at]


def kind_of(row):
    """A part by how many answers each of its rows has."""
    return int(row["weights"].sum())


def test_parts_of_a_mixture_have_their_shares_of_the_rows():
    parts = (Part(Needle(size=3), share=1.5), Part(Induction(), share=0.5), Part(Copy(), length=8, share=3.0))
    reader = ProbeMixture(24, parts, examples=400).open()
    found = np.array([kind_of(reader[i]) for i in range(len(reader))])
    counts = [np.mean(found == answers) for answers in (3, 1, 3 * 4)]
    np.testing.assert_allclose(counts, [0.3, 0.1, 0.6], atol=0.08)


def test_a_row_holds_as_many_sequences_of_its_part_as_fit_each_by_itself():
    reader = ProbeMixture(23, (Part(Needle(size=2), length=10),), examples=20).open()
    for row in (reader[i] for i in range(len(reader))):
        assert all(field.shape == (23,) for field in row.values())
        np.testing.assert_array_equal(row["segments"], [1] * 10 + [2] * 10 + [0] * 3)
        np.testing.assert_array_equal(row["positions"], [*range(10), *range(10), 0, 0, 0])
        np.testing.assert_array_equal(np.flatnonzero(row["weights"]), [8, 9, 18, 19])
        first, second = row["tokens"][:10], row["tokens"][10:20]
        assert first.tolist() != second.tolist()
        for tokens, targets in ((first, row["targets"][:10]), (second, row["targets"][10:20])):
            np.testing.assert_array_equal(tokens[1:], targets[:-1])
            assert [answered(Needle(), tokens, i) for i in (8, 9)] == targets[8:].tolist()


def test_padding_within_a_part_belongs_to_no_sequence():
    row = ProbeMixture(16, (Part(Recall(), length=8),), vocab=16).open()[0]
    np.testing.assert_array_equal(row["segments"], [1] * 8 + [2] * 8)
    even = ProbeMixture(14, (Part(Copy(), length=7),), vocab=16).open()[0]
    np.testing.assert_array_equal(even["segments"], [1] * 7 + [2] * 7)
    np.testing.assert_array_equal(np.flatnonzero(even["weights"]), [3, 4, 5, 10, 11, 12])


def test_rows_of_a_mixture_are_functions_of_seed_and_number():
    def drawn(seed, order):
        reader = ProbeMixture(20, (Part(Copy()), Part(Needle(), length=16)), examples=12, seed=seed).open()
        rows = {i: reader[i] for i in order}
        return np.stack([rows[i]["tokens"] for i in range(12)])

    forwards, backwards = drawn(0, range(12)), drawn(0, range(11, -1, -1))
    np.testing.assert_array_equal(forwards, backwards)
    assert len({tuple(row) for row in [*forwards, *drawn(1, range(12))]}) == 24


def test_a_config_names_the_parts_of_a_mixture():
    parts = (dict(task=dict(kind="recall", pairs=2), length=8, share=2), dict(task=dict(kind="needle")))
    section = dict(kind="probe_mixture", length=16, vocab=24, examples=6, parts=parts)
    data = build(Data, dict(source=section, batch_size=4, threads=0), "config.data")
    assert data.source.parts == (Part(Recall(pairs=2), 8, 2.0), Part(Needle()))
    assert sum(batch["mask"].sum() for batch in data.open().evaluate()) == 6


def test_recall_has_no_more_pairs_than_there_are_keys():
    for vocab, pairs in ((64, 16), (22, 10), (23, 10)):
        for row in rows(Recall(), length=63, vocab=vocab, count=5):
            first = int(np.flatnonzero(row["weights"])[0])
            assert first == 2 * pairs
            assert len({*row["tokens"][:first:2]}) == pairs


@pytest.mark.parametrize(
    ("task", "length", "vocab", "message"),
    [
        (Copy(), 1, 16, "copy needs at least 2 tokens, and length=1"),
        (Induction(), 2, 16, "induction needs at least 3 tokens"),
        (Needle(size=8), 16, 16, "needle needs at least 18 tokens"),
        (Recall(pairs=16), 63, 16, "recall of 63 tokens needs vocab=34 or more, not 16"),
        (Recall(), 63, 3, "recall of 63 tokens needs vocab=4 or more, not 3"),
        (Recall(pairs=8), 16, 64, "recall needs at least 17 tokens"),
    ],
)
def test_what_asks_nothing_is_refused(task, length, vocab, message):
    with pytest.raises(UsageError, match=message):
        Probe(length, task, vocab=vocab).open()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recall(pairs=0), "pairs=0"),
        (lambda: Needle(size=0), "size=0"),
        (lambda: Needle(depth=1.5), r"depth=1\.5"),
        (lambda: Probe(0, Copy()), "length=0"),
        (lambda: Probe(8, Copy(), examples=0), "examples=0"),
        (lambda: Part(Copy(), length=0), "length=0"),
        (lambda: Part(Copy(), share=0.0), "share=0.0"),
        (lambda: ProbeMixture(8, ()), "parts is empty"),
        (lambda: ProbeMixture(8, (Part(Copy(), length=9),)), "length=9 does not fit into rows of 8"),
        (lambda: ProbeMixture(8, (Part(Copy()),), examples=0), "examples=0"),
        (lambda: ProbeMixture(8, (Part(Copy()), Part(Needle()))).open(), "needle needs at least 10 tokens"),
    ],
)
def test_bad_fields_are_named(make, message):
    with pytest.raises(UsageError, match=message):
        make()
