"""Right answers are counted, whoever gives them."""

import numpy as np
import pytest

from effjax.config import build
from effjax.data import Data
from effjax.decoding.inftythink import Reasoning, Round
from effjax.errors import UsageError
from effjax.train.evaluators import rounds as evaluator
from effjax.train.evaluators.rounds import Rounds

SOURCE = dict(kind="running_sum", length=18, think=dict(eta=8, summary=2), steps=9, examples=5)


def unread(folder, shapes, of):
    raise AssertionError("there are no weights to read")


class Program:
    """Of a run, what the evaluator asks for: a task with a model."""

    task = model = property(lambda self: self)

    def clone(self, max_length):
        assert max_length is None
        return self


def test_answers_are_compared_and_contexts_counted(monkeypatch):
    data = build(Data, dict(source=SOURCE, batch_size=3), "data")
    known = {tuple(question): answer for question, answer in map(data.source.ask, range(5))}
    sizes = []

    def reason(model, variables, questions, think, key, sampling):
        sizes.append(len(questions))
        told = []
        for i, question in enumerate(questions):
            answer = known[tuple(question)]
            first = Round(tuple(question), (7,) * 8, (7, 7))
            last = Round((*question, 1, 7, 7), (5, *answer) if i == 0 else (5, 5), None)
            told.append(Reasoning((first, last) if i < 2 else (first,)))
        return told

    monkeypatch.setattr(evaluator, "reason", reason)
    found = Rounds(data, "1 steps").open(unread)(Program(), {}, lambda: None)
    assert sizes == [3, 2]
    assert found["accuracy"] == 2 / 5
    assert found["finished"] == 4 / 5
    assert found["rounds"] == np.mean([2, 2, 1, 2, 2])
    assert found["peak_tokens"] == 4 + 8 + 3
    assert found["keys_attended"] == pytest.approx(15 * 16 / 2 + np.mean([55, 45, 0, 55, 45]))


def test_data_without_questions_are_refused():
    probe = dict(kind="probe", task=dict(kind="copy"), length=8)
    data = build(Data, dict(source=probe, batch_size=3), "data")
    with pytest.raises(UsageError, match="the evaluator 'rounds' needs questions"):
        Rounds(data, "1 steps").open(unread)
