import json
import math

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from effjax.errors import RunError
from experiments.run.events import EventFile
from experiments.run.metrics import MetricsWriter, read


def lines(workdir):
    return (workdir / "metrics.jsonl").read_text().splitlines()


def events(workdir):
    """Reads TFRecord framing: length (8 bytes), checksum (4), data, checksum (4)."""
    found = []
    for file in sorted((workdir / "events").iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            found.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 16 + length
    return found


def test_lines_are_there_at_once_and_read_back(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, "train", {"loss": 0.5})
        assert read(tmp_path / "metrics.jsonl") == [{"step": 1, "split": "train", "loss": 0.5}]
        writer.write(2, "test", {"accuracy": 1})
    assert lines(tmp_path)[1] == '{"step": 2, "split": "test", "accuracy": 1.0}'


def test_numbers_that_are_not_finite_are_valid_json(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, "train", {"a": math.nan, "b": math.inf, "c": -math.inf})
    strict = json.loads(lines(tmp_path)[0], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict["a"] == "NaN"
    row = read(tmp_path / "metrics.jsonl")[0]
    assert math.isnan(row["a"])
    assert (row["b"], row["c"]) == (math.inf, -math.inf)


def test_resuming_removes_what_is_to_come_again_and_the_torn_line(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 6):
            writer.write(step, "train", {"loss": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "split": "tra')
    assert [row["step"] for row in read(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    with MetricsWriter(tmp_path, restored_step=3) as writer:
        writer.write(4, "train", {"loss": 40})
    assert [row["loss"] for row in read(tmp_path / "metrics.jsonl")] == [1, 2, 3, 40]


def test_a_line_torn_just_before_its_newline_does_not_swallow_the_next(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "split": "train", "loss": 1.0}')
    with MetricsWriter(tmp_path, restored_step=1) as writer:
        writer.write(2, "train", {"loss": 2})
    assert [row["step"] for row in read(tmp_path / "metrics.jsonl")][-1] == 2


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "split": "a"}\nnonsense\n{"step": 2, "split": "a"}\n')
    with pytest.raises(RunError, match="line 2 is broken: b'nonsense'"):
        read(path)
    MetricsWriter(tmp_path, restored_step=2).close()
    assert [row["step"] for row in read(path)] == [1, 2]


def test_tensorboard_gets_the_values_and_is_told_of_the_restart(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(7, "train", {"loss": 0.5, "bad": math.nan})
    scalars = {(e.step, v.tag): v.simple_value for e in events(tmp_path) for v in e.summary.value}
    assert scalars[7, "train/loss"] == 0.5
    assert math.isnan(scalars[7, "train/bad"])
    MetricsWriter(tmp_path, restored_step=3).close()
    restarts = [e.step for e in events(tmp_path) if e.session_log.status == SessionLog.START]
    assert restarts == [4]


def test_reserved_names_are_refused(tmp_path):
    with MetricsWriter(tmp_path) as writer, pytest.raises(ValueError, match="called step"):
        writer.write(1, "train", {"step": 1.0})


def test_a_full_disk_is_named(tmp_path):
    # /dev/full refuses every byte, as a full disk does.
    with MetricsWriter(tmp_path) as writer:
        with writer._file:
            writer._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
        with pytest.raises(RunError, match=r"disk is full: .*metrics\.jsonl"):
            writer.write(1, "train", {"loss": 1})


def test_a_full_disk_does_not_hang_the_event_file(tmp_path):
    events = EventFile(tmp_path / "events")
    events._records.close()
    events._records._writer = open("/dev/full", "wb")  # noqa: SIM115
    with pytest.raises(RunError, match=r"disk is full: .*events"):
        events.write(1, {f"metric_{number}": 1.0 for number in range(1000)})
    with pytest.raises(RunError, match=r"disk is full: .*events"):
        events.close()
