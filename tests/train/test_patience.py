"""Orbax gives up late and quietly, and clocks that jump are nothing to it."""

import asyncio
import time

import jax.numpy as jnp
import pytest

from effjax.train.checkpoint import Checkpoints
from effjax.train.patience import _PatientLoop, patience


def test_a_loop_that_is_closed_is_told_nothing_more():
    """Where one array cannot be written, threads that write the others end behind it."""
    loop, told = _PatientLoop(), []
    loop.call_soon_threadsafe(told.append, "in time")
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    loop.call_soon_threadsafe(told.append, "too late")
    assert told == ["in time"]


def jumping(monkeypatch, by):
    """Every look at the clock on the wall finds it further on."""
    real, looks = time.time, iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: real() + by * next(looks))


@pytest.mark.parametrize("by", [86400.0, -86400.0])
def test_a_clock_that_jumps_costs_no_checkpoint(by, tmp_path, monkeypatch):
    jumping(monkeypatch, by)
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, {"w": jnp.full(4, step)}, {})
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2]
    checkpoints.close()


def test_what_is_in_place_while_it_is_entered_is_gone_afterwards():
    make = asyncio.new_event_loop
    with patience(), patience():
        assert asyncio.new_event_loop is _PatientLoop
    assert asyncio.new_event_loop is make
    from orbax.checkpoint._src.futures import signaling_client

    assert signaling_client.time is time


def test_steady_seconds_begin_at_the_time_of_day():
    from orbax.checkpoint._src.futures import signaling_client

    with patience():
        assert signaling_client.time is not time
        assert abs(signaling_client.time.time() - time.time()) < 1.0
        assert signaling_client.time.sleep is time.sleep
