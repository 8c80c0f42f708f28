"""Wall time is charged to one thing at a time."""

import pytest

from effjax.train.goodput import KINDS, WallTime


class Clock:
    def __init__(self):
        self.time = 100.0

    def __call__(self):
        return self.time


def test_what_is_within_is_taken_from_what_is_around():
    clock = Clock()
    wall = WallTime(clock)
    clock.time += 1
    with wall.spent("evaluation"):
        clock.time += 2
        with wall.spent("data"):
            clock.time += 4
        clock.time += 8
    clock.time += 16
    assert wall.seconds == dict.fromkeys(KINDS, 0.0) | {"step": 17, "evaluation": 10, "data": 4}
    assert sum(wall.seconds.values()) == clock.time - 100


def test_an_error_leaves_the_kind_it_was_in():
    clock = Clock()
    wall = WallTime(clock)

    def fail():
        with wall.spent("checkpoint"):
            clock.time += 3
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    clock.time += 1
    assert wall.seconds["checkpoint"] == 3
    assert wall.seconds["step"] == 1
