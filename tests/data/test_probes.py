import numpy as np
import pytest

from effjax.config import build
from effjax.data import Data, sources
from effjax.data.probes import FIRST, KINDS, MARK, Copy, Induction, Mixed, Needle, Probe, Recall
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


def test_each_sequence_of_a_mixture_is_of_one_of_its_tasks():
    drawn = rows(Mixed((Copy(), Induction())), count=200)
    halves = [row["weights"].sum() for row in drawn]
    assert {*halves} == {1.0, 10.0}
    assert 70 < halves.count(1.0) < 130
    section = dict(kind="probe", task=dict(kind="mixed", tasks=(dict(kind="recall", pairs=2),)), length=12)
    assert build(Data, dict(source=section, batch_size=2), "data").source.task == Mixed((Recall(2),))
    with pytest.raises(UsageError, match="mixed needs tasks"):
        Mixed(())


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
    assert {*KINDS} == {*ALL, "mixed"}
    assert sources.KINDS["probe"] is Probe


@pytest.mark.parametrize(
    ("task", "length", "vocab", "message"),
    [
        (Copy(), 1, 16, "copy needs at least 2 tokens, and length=1"),
        (Induction(), 2, 16, "induction needs at least 3 tokens"),
        (Needle(size=8), 16, 16, "needle needs at least 18 tokens"),
        (Recall(), 63, 16, "recall of 63 tokens needs vocab=34 or more, not 16"),
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
    ],
)
def test_bad_fields_are_named(make, message):
    with pytest.raises(UsageError, match=message):
        make()
