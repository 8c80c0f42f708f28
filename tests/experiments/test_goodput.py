"""The record of what a run spent its time on, over starts, and what of it was lost."""

import pytest

from effjax.train.goodput import KINDS
from experiments.run.goodput import FILE_NAME, GoodputLog, read, section


def spent(**seconds):
    return dict.fromkeys(KINDS, 0.0) | seconds


def test_steps_that_were_done_again_are_lost(tmp_path):
    first = GoodputLog(tmp_path, 0, 2.0)
    first.write(50, spent(step=5.0, compile=4.0))
    first.write(100, spent(step=10.0, compile=4.0, data=1.0))  # killed behind its checkpoint of step 80
    second = GoodputLog(tmp_path, 80, 1.0)
    second.write(200, spent(step=12.0, compile=3.0, checkpoint=0.5))
    found = read(tmp_path)
    assert found.starts == 2
    assert found.lost == pytest.approx(10.0 * 20 / 100)
    kept = spent(starting=3.0, compile=7.0, data=1.0, checkpoint=0.5, step=20.0)
    assert found.seconds == pytest.approx(kept)
    assert found.share == pytest.approx(20.0 / (3 + 7 + 1 + 0.5 + 20 + 2))
    (table,) = section(found).parts
    assert table.rows[-1][0] == "steps done again"


def test_a_torn_line_and_a_start_that_did_nothing_are_no_trouble(tmp_path):
    assert read(tmp_path) is None
    log = GoodputLog(tmp_path, 0, 0.0)
    log.write(10, spent(step=1.0))
    with (tmp_path / FILE_NAME).open("a") as file:
        file.write('{"start": 0, "from": 0, "st')
    found = read(tmp_path)
    assert found.lost == 0
    assert found.seconds["step"] == 1.0
    GoodputLog(tmp_path, 10, 0.0).write(10, spent())
    assert read(tmp_path).seconds["step"] == 1.0
