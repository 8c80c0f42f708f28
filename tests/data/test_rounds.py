"""Nothing is lost where reasoning is cut, every round reads what the one before found out, and no more."""

import itertools
import json

import numpy as np
import pytest

from effjax.config import build
from effjax.data import Data
from effjax.data.records import BadRecord
from effjax.data.rounds import ANSWER, FIRST, Round, RunningSum, Traces, cut, paragraphs, rounds, row
from effjax.decoding.inftythink import InftyThink
from effjax.errors import UsageError

THINK = InftyThink(eta=6, summary=2)


@pytest.mark.parametrize("eta", range(1, 9))
def test_segments_are_a_lossless_partition_and_none_is_longer_than_eta(draw, eta):
    for _ in range(30):
        check_partition([draw.integers(3, 99, draw.integers(0, 10)).tolist() for _ in range(12)], eta)


def check_partition(pieces, eta):
    segments = cut(pieces, eta)
    assert [*itertools.chain(*segments)] == [*itertools.chain(*pieces)]
    assert all(1 <= len(segment) <= eta for segment in segments)
    # Cuts lie between paragraphs, but within those longer than eta.
    ends = np.cumsum([len(piece) for piece in pieces]).tolist()
    spans = [range(end - len(piece), end) for piece, end in zip(pieces, ends, strict=True)]
    inside = {place for span in spans if len(span) > eta for place in span}
    assert {*np.cumsum([len(segment) for segment in segments]).tolist()} <= {*ends} | inside


def test_each_segment_is_as_full_as_it_can_be():
    assert cut([[1, 1], [2, 2], [3, 3], [4], [5] * 7, [6]], 5) == [
        [1, 1, 2, 2],
        [3, 3, 4],
        [5] * 5,
        [5, 5, 6],
    ]
    assert cut([], 5) == []


def test_paragraphs_are_the_text(draw):
    for _ in range(100):
        thoughts = "".join(draw.choice(list("aBé .\n\n\n"), draw.integers(0, 40)))
        assert "".join(paragraphs(thoughts)) == thoughts


def test_a_paragraph_begins_with_a_capital_behind_an_empty_line():
    assert paragraphs("So it is.\n\nThen\nThat\n\nand\n\nÉtant") == [
        "So it is.\n\n",
        "Then\nThat\n\nand\n\n",
        "Étant",
    ]


def test_rounds_read_the_question_and_the_last_summary():
    pieces = [[10, 11, 12], [13, 14, 15], [16, 17], [18, 19, 20, 21], [22]]
    made = rounds([5, 6], pieces, lambda so_far: [len(so_far), so_far[-1]], THINK)
    assert made == [
        Round([5, 6], [10, 11, 12, 13, 14, 15, 2, 6, 15, 0]),
        Round([5, 6, 1, 6, 15], [16, 17, 18, 19, 20, 21, 2, 12, 21, 0]),
        Round([5, 6, 1, 12, 21], [22, 0]),
    ]
    assert rounds([5], [[7]], lambda so_far: [], THINK) == [Round([5], [7, 0])]
    for each in made:
        assert len(each.prompt) + len(each.target) <= THINK.peak(2) + 1
    with pytest.raises(UsageError, match="a summary has 3 tokens, and summary=2 is the most"):
        rounds([5], pieces, lambda so_far: [1, 2, 3], THINK)
    with pytest.raises(UsageError, match="there is nothing to think"):
        rounds([5], [], lambda so_far: [], THINK)


def test_only_what_is_written_has_weight():
    example = row(Round([5, 6], [10, 2, 7, 0]), 8)
    assert example["tokens"].tolist() == [5, 6, 10, 2, 7, 0, 0, 0]
    assert example["targets"].tolist() == [6, 10, 2, 7, 0, 0, 0, 0]
    assert example["weights"].tolist() == [0, 1, 1, 1, 1, 0, 0, 0]
    assert example["segments"].tolist() == [1] * 6 + [0] * 2
    assert row(Round([5, 6], [10, 2, 7, 0]), 3)["targets"].tolist() == [6, 10, 2]


SUM = RunningSum(length=18, think=InftyThink(eta=8, summary=2), steps=9, least=5, modulus=7, examples=300)


def test_a_running_sum_is_one():
    value = FIRST + 9 + 1
    for index in range(20):
        question, answer = SUM.ask(index)
        stop, step, count, start = question
        steps = count - FIRST
        assert stop == 0
        assert 5 <= steps <= 9
        total = (start - value + (step - value) * steps) % 7
        assert answer == [ANSWER, value + total]


def test_its_rounds_go_on_from_the_last_step():
    """From the text alone: every step counts down by one and adds what is asked for."""
    value, seen = FIRST + 9 + 1, set()
    for index in range(SUM.examples):
        example = SUM[index]
        tokens = [*example["tokens"].tolist(), int(example["targets"][-1])]
        begin = 7 if tokens[4] == 1 else 4
        _, step, count, total = tokens[:4] if begin == 4 else [*tokens[:2], *tokens[5:7]]
        at = begin
        while tokens[at] not in (ANSWER, 2):
            count, total = count - 1, value + (total - value + step - value) % 7
            assert tokens[at : at + 2] == [count, total]
            at += 2
        if tokens[at] == ANSWER:
            assert count == FIRST
            assert tokens[at + 1 : at + 3] == [total, 0]
        else:
            assert tokens[at + 1 : at + 4] == [count, total, 0]
        first = int(np.flatnonzero(example["weights"])[0])
        assert first == begin - 1
        seen.add((begin == 7, tokens[at] == ANSWER))
    assert seen == {(False, False), (True, False), (True, True)}


def test_it_repeats_with_the_seed_and_is_a_source():
    data = dict(
        source=dict(kind="running_sum", length=18, think=dict(eta=8, summary=2), steps=9), batch_size=4
    )
    batch = next(iter(build(Data, data, "data").open().evaluate()))
    assert batch["tokens"].shape == (4, 18)
    np.testing.assert_array_equal(SUM[3]["tokens"], SUM[3]["tokens"])
    assert not np.array_equal(RunningSum(18, THINK, 9, seed=1).ask(3), RunningSum(18, THINK, 9).ask(3))
    assert SUM.vocab == 4 + 10 + 7


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(least=10), "least=10 must be between 1 and steps=9"),
        (dict(modulus=0), "modulus=0"),
        (dict(length=17), "rounds have up to 19 tokens: give length=18, or cut=True"),
    ],
)
def test_bad_sums_are_named(fields, message):
    with pytest.raises(UsageError, match=message):
        RunningSum(**dict(length=18, think=InftyThink(8, 2), steps=9) | fields)


RECORD = dict(
    question="1+1+1?",
    thoughts="One.\n\nTwo.\n\nThree.",
    summaries=["at 1", "at 2", "at 3"],
    answer="It is 3.",
)


def traces(tmp_path, *records, **fields):
    path = tmp_path / "traces.jsonl"
    path.write_text("\n".join(each if isinstance(each, str) else json.dumps(each) for each in records))
    think = InftyThink(eta=12, summary=4)
    return Traces(**dict(path=str(path), length=40, think=think) | fields).open()


def said(example):
    """The text with its marks spelled out, as the tokens are bytes."""
    tokens = [*example["tokens"].tolist(), int(example["targets"][-1])]
    return bytes(tokens).rstrip(b"\0").decode().replace("\1", "<h>").replace("\2", "<s>")


def test_traces_are_read_from_a_file(tmp_path):
    reader = traces(tmp_path, RECORD, "", RECORD)
    assert len(reader) == 6
    assert said(reader[0]) == "\x001+1+1?One.\n\nTwo.\n\n<s>at 2"
    assert said(reader[1]) == "\x001+1+1?<h>at 2Three.<s>at 3"
    assert said(reader[2]) == "\x001+1+1?<h>at 3It is 3."


@pytest.mark.parametrize(
    ("record", "fields", "message"),
    [
        ("no json", {}, "line 1: JSONDecodeError"),
        ({"question": "1?"}, {}, "line 1: KeyError: 'thoughts'"),
        (RECORD | dict(summaries=["at 1"]), {}, "there is no summary behind token 12"),
        (RECORD | dict(summaries=["at 1", "at two"]), {}, "a summary has 6 tokens"),
        (RECORD, dict(length=20), "a round of 25 tokens exceeds length=20"),
    ],
)
def test_a_broken_trace_is_named(tmp_path, record, fields, message):
    reader = traces(tmp_path, record, **fields)
    with pytest.raises(BadRecord, match=message):
        reader[0]


def test_files_that_are_not_there_are_named(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        Traces("nowhere.jsonl", 40, THINK).open()
    with pytest.raises(UsageError, match="has no lines"):
        traces(tmp_path)
