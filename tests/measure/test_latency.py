"""Timing by a clock that the test holds, so that no test depends on the machine's load."""

import io

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData
from rich.console import Console

from effjax.errors import UsageError
from effjax.measure import Comparison, Timing, compare, count, latency, time_function
from effjax.measure.device_time import busy_seconds, device_seconds


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
        {"slow": candidate("slow", 3.0), "fast": candidate("fast", 1.0)},
        [(0,)],
        warmup=1,
        repeats=3,
        costs={},
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


def product(size):
    """A function of (size, size) -> (size, size) with size^3 MACs."""
    return jax.jit(lambda x: x[:size, :size] @ x[:size, :size])


def test_every_comparison_predicts_from_macs_and_says_what_came_true(monkeypatch):
    ticks = iter(t for seconds in (8.0, 2.0) * 2 for t in (0.0, seconds))
    monkeypatch.setattr(latency.time, "perf_counter", lambda: next(ticks))
    functions = {"full": product(16), "half": product(8)}
    result = compare(functions, [(jnp.ones((16, 16)),)], warmup=1, repeats=2)
    assert result.costs["half"].macs == 8**3
    assert result.speedup("half") == 4.0
    assert result.predicted("half") == 8.0
    assert result.realised("half") == 0.5
    assert (result.predicted("full"), result.realised("full")) == (1.0, 1.0)


def test_without_macs_nothing_is_predicted():
    wave, dot = (
        count(jnp.sin, 1.0, parameters=None),
        count(jnp.dot, jnp.ones(3), jnp.ones(3), parameters=None),
    )
    timings = {"a": Timing((2.0,)), "b": Timing((1.0,))}
    for costs in ({}, {"a": dot}, {"a": wave, "b": dot}, {"a": dot, "b": wave}):
        result = Comparison(timings, costs)
        assert result.speedup("b") == 2.0
        assert result.predicted("b") is result.realised("b") is None


def drawn(result):
    console = Console(file=io.StringIO(), width=120)
    console.print(result.table())
    return console.file.getvalue()


def test_the_table_shows_time_arithmetic_and_what_came_true():
    dot = count(jnp.dot, jnp.ones((10, 10)), jnp.ones((10, 10)), parameters=None)
    wave = count(jnp.sin, 1.0, parameters=None)
    timings = {"base": Timing((2e-3,)), "same": Timing((1e-3,)), "wave": Timing((5e-4,))}
    lines = drawn(Comparison(timings, {"base": dot, "same": dot, "wave": wave}, 2)).splitlines()
    rows = {line.split()[1]: line.replace("│", " ").split() for line in lines if line.startswith("│")}
    assert rows["same"] == ["same", "1", "ms", "0", "ns", "2.00x", "1.00k", "1.00x", "200%"]
    assert rows["wave"][-3:] == ["-", "-", "-"]
    assert "caches" not in "".join(lines)
    assert "on device" not in "".join(lines)


def test_the_table_notes_a_single_input_set_and_a_device_time():
    text = drawn(Comparison({"base": Timing((2e-3,), device=1.5e-3)}))
    assert "one set of inputs: caches may flatter" in text
    assert "on device" in text
    assert "1.5 ms" in text


def test_a_function_that_cannot_be_traced_says_what_to_give_instead():
    compiled = jax.jit(jnp.sin).lower(jnp.ones(3)).compile()
    with pytest.raises(UsageError, match=r"'compiled' cannot be traced.*costs=\{\}"):
        compare({"compiled": compiled}, [(jnp.ones(3),)])
    assert compare({"compiled": compiled}, [(jnp.ones(3),)], costs={}).timings["compiled"].median > 0


def trace(plane, **lines):
    """A profile with one plane; each line holds `(start, duration)` in nanoseconds."""
    body = "".join(
        f'lines {{ id: {number} name: "{name.replace("_", " ")}" '
        + "".join(f"events {{ offset_ps: {start}000 duration_ps: {length}000 }}" for start, length in events)
        + "}"
        for number, (name, events) in enumerate(lines.items())
    )
    return ProfileData.from_text_proto(f'planes {{ name: "{plane}" {body} }}')


def test_busy_time_counts_overlapping_work_once():
    streams = {"Stream #1(Compute)": [(0, 100), (150, 50)], "Stream #2(Memcpy)": [(50, 100), (160, 10)]}
    assert busy_seconds(trace("/device:GPU:0", **streams)) == pytest.approx(200e-9)
    # The same time under other names does not count again, idle time between programs not at all.
    lines = {"Steps": [(0, 1000)], "XLA_Modules": [(0, 100), (500, 100)], "XLA_Ops": [(0, 90), (500, 90)]}
    assert busy_seconds(trace("/device:TPU:0", **lines)) == pytest.approx(200e-9)


def test_a_cpu_has_no_device_time():
    """The profiler's own trace of a CPU run, so that its format is what is read."""
    function = jax.jit(jnp.sin)
    assert device_seconds(function, [(jnp.ones(3),)], repeats=2) is None
    assert busy_seconds(trace("/host:CPU", **{"python": [(0, 100)]})) is None
    assert time_function(function, (jnp.ones(3),)).device is None
