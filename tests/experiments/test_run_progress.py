import io

import pytest
from rich.console import Console

from experiments.run.closing import closing_table
from experiments.run.formatting import clock, count, duration, measurement
from experiments.run.progress import Progress


class Clock:
    def __init__(self):
        self.time = 100.0

    def __call__(self):
        return self.time


def plain(width=40):
    return Console(file=io.StringIO(), width=width)


def terminal(width=100):
    return Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)


def lines(console):
    return console.file.getvalue().splitlines()


def test_plain_lines_come_every_so_many_seconds_and_at_the_end():
    console, now = plain(), Clock()
    with Progress(400, units_per_step=32, unit="images", every=10, console=console, now=now) as progress:
        for step in range(1, 401):
            now.time += 0.125
            progress.update(step, {"loss": 1 / step})
    # 50 seconds: five lines, none broken by the width of the console.
    assert lines(console)[0] == "step 80/400  loss 0.0125  256 images/s  0:40 left"
    assert [line.split()[1] for line in lines(console)] == [
        f"{step}/400" for step in (80, 160, 240, 320, 400)
    ]
    assert lines(console)[-1].endswith("0:00 left")


def test_values_are_fetched_only_for_a_line():
    console, now, fetched = plain(), Clock(), []

    def fetch():
        fetched.append(now.time)
        return {"loss": 2.0}

    with Progress(1000, every=10, console=console, now=now) as progress:
        for step in range(1, 201):
            now.time += 0.125
            progress.update(step, fetch)
    # After 10 and 20 seconds, and once more because the last state was not shown yet.
    assert len(fetched) == len(lines(console)) == 3
    assert lines(console)[-1].startswith("step 200/1000  loss 2 ")


def test_a_resumed_run_counts_only_its_own_steps():
    console, now = plain(), Clock()
    with Progress(1000, start=900, every=1, console=console, now=now) as progress:
        now.time += 1
        progress.update(910)
    assert lines(console) == ["step 910/1000  10 examples/s  0:09 left"]


def test_a_pause_does_not_slow_the_rate():
    console, now = plain(), Clock()
    with Progress(100, every=5, console=console, now=now) as progress:
        for step in range(1, 11):
            now.time += 1
            if step == 5:
                with progress.pause("evaluating"):
                    now.time += 500
            progress.update(step)
    assert lines(console)[-1] == "step 10/100  1 examples/s  1:30 left"


def test_the_rate_follows_a_change_of_speed():
    now = Clock()
    progress = Progress(10_000, every=1, console=plain(), now=now)
    for step in range(1, 1001):
        now.time += 0.1 if step <= 500 else 1.0
        progress.update(step)
    assert "  1 examples/s" in progress.line()


def test_a_terminal_shows_one_live_line_with_messages_above():
    console, now = terminal(), Clock()
    with Progress(10, units_per_step=8, unit="tokens", console=console, now=now) as progress:
        for step in range(1, 11):
            now.time += 0.1
            progress.update(step, {"loss": 0.5})
            if step == 5:
                progress.message("checkpoint 4 [torn]")
            if step == 6:
                with progress.pause("evaluating"):
                    assert "evaluating" in console.file.getvalue()
    shown = console.file.getvalue()
    assert "checkpoint 4 [torn]" in shown
    assert "step 10/10  loss 0.5  80 tokens/s  0:00 left" in shown
    # Redrawn at 0.3, 0.6, 0.9 and 1.0 seconds, not ten times.
    drawn = {f"step {step}/10" for step in range(1, 11) if f"step {step}/10" in shown}
    assert drawn == {"step 3/10", "step 6/10", "step 9/10", "step 10/10"}


def test_the_closing_table_keeps_paths_whole():
    report = "runs/a-rather-long-name-of-a-run/that-goes-on-and-on/report.html"
    console = plain(width=30)
    closing_table("digits", {"accuracy": "0.981", "report": report}, console)
    assert lines(console) == ["digits", "accuracy  0.981", f"report    {report}"]
    console = terminal(width=100)
    closing_table("[digits]", {"accuracy": "0.981", "report": report}, console)
    assert "[digits]" in console.file.getvalue()
    assert report in console.file.getvalue()


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (count(650), "650"),
        (count(12_345), "12.35k"),
        (count(999_996), "1.00M"),
        (count(999_000), "999.00k"),
        (count(5_717_416), "5.72M"),
        (count(118.6e9), "118.60G"),
        (measurement(0.53124), "0.5312"),
        (measurement(1e-5), "1e-05"),
        (measurement(3.0), "3"),
        (measurement(float("nan")), "NaN"),
        (measurement(float("-inf")), "-Inf"),
        (duration(0.0125), "12.5 ms"),
        (duration(3.21), "3.21 s"),
        (duration(75), "1:15"),
        (clock(59.7), "1:00"),
        (clock(3723), "1:02:03"),
    ],
)
def test_numbers_read_well(made, expected):
    assert made == expected
