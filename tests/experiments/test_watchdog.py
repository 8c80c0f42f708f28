"""The watchdog tells once where the loop is silent, and nothing while it goes on."""

import threading
import time

import pytest

from experiments.run.watchdog import STAGES, Watchdog


@pytest.fixture
def told():
    return []


def hanging(seconds, until):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not until():
        time.sleep(0.01)


def test_silence_is_told_once_with_the_place(told):
    with Watchdog(times=4, at_least=0.15, every=0.02, tell=told.append) as dog:
        for _ in range(3):
            time.sleep(0.01)
            dog.beat()
        hanging(3, lambda: told)
        time.sleep(0.1)
        assert len(told) == 1
        assert "no step for" in told[0]
        assert "in hanging" in told[0]
        dog.beat()
        hanging(3, lambda: len(told) > 1)
    assert len(told) == 2


def test_slow_steps_and_pauses_are_no_silence(told):
    with Watchdog(times=50, at_least=0.05, every=0.01, tell=told.append) as dog:
        time.sleep(0.2)  # compiling
        for _ in range(2):
            time.sleep(0.02)
            dog.beat()
        time.sleep(0.1)  # five times a step
        dog.beat()
        with dog.pause():
            time.sleep(0.2)
    assert not told
    assert not [thread for thread in threading.enumerate() if thread.name == "watchdog"]


@pytest.mark.parametrize("part", ["effjax/data/", "effjax/train/checkpoint"])
def test_the_stage_is_named(told, part):
    names = {}
    code = compile("def wait(f): f()", f"/somewhere/{part}x.py", "exec")
    exec(code, names)
    with Watchdog(times=1, at_least=0.05, every=0.01, tell=told.append) as dog:
        dog.beat()
        names["wait"](lambda: hanging(3, lambda: told))
    assert STAGES[part] in told[0].splitlines()[0]
