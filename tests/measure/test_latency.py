"""Timing by a clock that the test holds, so that no test depends on the machine's load."""

import jax
import jax.numpy as jnp
import pytest

from effjax.errors import UsageError
from effjax.measure import Comparison, Timing, compare, latency, time_function


@pytest.fixture
def clock(monkeypatch):
    """A clock that a function moves by calling `clock.advance`."""

    class Clock:
        now = 0.0

        def advance(self, seconds):
            self.now += seconds

    held = Clock()
    monkeypatch.setattr(latency.time, "perf_counter", lambda: held.now)
    return held


def test_median_and_spread_leave_an_outlier_out():
    timing = Timing((1.0, 2.0, 3.0, 4.0, 100.0))
    assert (timing.median, timing.spread) == (3.0, 2.0)


def test_inputs_take_turns_and_warm_up_is_not_counted(clock):
    seen = []

    def function(x):
        clock.advance(100.0 if len(seen) < 3 else x)
        seen.append(x)

    timing = time_function(function, (1.0,), (2.0,), (3.0,), warmup=1, repeats=4)
    # Every set is warmed up although one run was asked for.
    assert seen == [1.0, 2.0, 3.0, 1.0, 2.0, 3.0, 1.0]
    assert timing.runs == (1.0, 2.0, 3.0, 1.0)


def test_candidates_alternate_and_ratios_are_taken_pair_by_pair(clock):
    order = []
    load = iter([1.0, 1.0, 1.0, 1.0, 8.0, 8.0, 2.0, 2.0])

    def candidate(name, seconds):
        def function(_):
            order.append(name)
            clock.advance(seconds * next(load))

        return function

    result = compare(
        {"slow": candidate("slow", 3.0), "fast": candidate("fast", 1.0)}, [(0,)], warmup=1, repeats=3
    )
    assert order == ["slow", "fast"] * 4
    assert result.baseline == "slow"
    # The machine's load, which changes from round to round, does not show in the ratios.
    assert result.speedups("fast") == (3.0, 3.0, 3.0)
    assert result.speedup("fast") == 3.0


def test_the_ratio_is_the_median_of_pairs_not_the_ratio_of_medians():
    result = Comparison({"a": Timing((1.0, 2.0, 9.0)), "b": Timing((1.0, 4.0, 3.0))})
    assert result.speedup("b") == 1.0
    assert result.timings["a"].median / result.timings["b"].median == pytest.approx(2 / 3)


def test_it_waits_for_the_result(monkeypatch):
    waited = []
    monkeypatch.setattr(latency.jax, "block_until_ready", lambda x: waited.append(x))
    time_function(jax.jit(jnp.sin), (jnp.ones(3),), warmup=1, repeats=2)
    assert len(waited) == 3


def test_nothing_to_time_is_a_usage_error():
    with pytest.raises(UsageError, match="at least one"):
        time_function(jnp.sin)
    with pytest.raises(UsageError, match="repeats"):
        time_function(jnp.sin, (1.0,), repeats=0)
