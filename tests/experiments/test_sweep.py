"""Sweeps: what is tried, in which order it is given up, and that nothing complete is done again."""

import dataclasses
import json
import threading
from fractions import Fraction
from pathlib import Path

import pytest

from effjax.errors import Preempted, RunError, UsageError
from experiments.cli import LoadedConfig
from experiments.run import sweeping
from experiments.run.children import Job, run_all
from experiments.run.signals import StopFlag
from experiments.run.sweep_space import parse, points
from tests.experiments.driver import drive
from tests.train.toy import smoke


def test_lists_make_a_grid():
    axes = [parse("config.optimizer.lr=1e-3,1e-2"), parse("model.depth=4,6,8")]
    found = points(axes, None, 0)
    assert len(found) == 6
    assert found[1] == (("optimizer.lr", "1e-3"), ("model.depth", "6"))


def test_ranges_are_drawn_from_and_no_point_comes_twice():
    axes = [parse("lr=log:1e-4:1e-1"), parse("drop=uniform:0:0.5"), parse("depth=integer:2:3")]
    found = points(axes, 400, 7)
    assert found == points(axes, 400, 7) != points(axes, 400, 8)
    assert len(set(found)) == 400
    rates, drops, depths = (
        [float(value) for value in column] for column in zip(*(dict(p).values() for p in found), strict=True)
    )
    assert 1e-4 <= min(rates) < max(rates) <= 1e-1
    assert 0.2 < sum(rate < 1e-3 for rate in rates) / 400 < 0.47  # a third of the factors of ten
    assert 0 <= min(drops) < 0.05
    assert 0.45 < max(drops) <= 0.5
    assert set(depths) == {2, 3}
    assert sorted(points([parse("a=1,2,3")], 3, 0)) == [(("a", "1"),), (("a", "2"),), (("a", "3"),)]


@pytest.mark.parametrize(
    ("axes", "trials", "match"),
    [
        (["lr"], None, "write KEY=VALUE"),
        (["lr=1,1"], None, "every value once"),
        (["lr=log:0:1"], 2, "above 0"),
        (["lr=uniform:2:1"], 2, "LOW must be less"),
        (["depth=integer:1:2.5"], 2, "a range is integer:LOW:HIGH"),
        (["lr=log:1e-3:1e-2"], None, "say how many --trials"),
        (["lr=1", "lr=2"], None, "is there twice"),
        (["lr=1,2"], 3, "there are 2 combinations"),
        (["depth=integer:1:2"], 3, "only 2 different points"),
    ],
)
def test_what_cannot_be_swept_is_said(axes, trials, match):
    with pytest.raises(UsageError, match=match):
        points([parse(said) for said in axes], trials, 0)


def test_rungs_end_with_the_whole_run():
    assert sweeping.rungs(9, 3) == [Fraction(1, 9), Fraction(1, 3), Fraction(1)]
    assert sweeping.rungs(8, 3) == [Fraction(1, 3), Fraction(1)]
    assert sweeping.rungs(1, 2) == [Fraction(1)]
    assert sweeping.rungs(100, None) == [Fraction(1)]
    with pytest.raises(UsageError, match="halving=1"):
        sweeping.rungs(8, 1)


def test_a_share_of_a_duration():
    assert sweeping.shortened("30 epochs", Fraction(1, 3)) == "10 epochs"
    assert sweeping.shortened("1 epochs", Fraction(1, 4)) == "0.25 epochs"
    assert sweeping.shortened("5k steps", Fraction(1, 9)) == "556 steps"


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Runs that take no time; returns a function that lists which were trained."""
    log = tmp_path / "trained"
    monkeypatch.setenv("TRAINED", str(log))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    job = sweeping._Sweep._job
    fake = lambda self, trial: dataclasses.replace(job(self, trial), module="tests.experiments.fake_train")
    monkeypatch.setattr(sweeping._Sweep, "_job", fake)
    return lambda: log.read_text().splitlines() if log.exists() else []


def swept(out, *axes, stop=None, **fields):
    request = dict(trials=None, halving=None, metric="test/loss", processes=2, seed=0) | fields
    config = smoke("vision", train__steps="90 steps")
    loaded = LoadedConfig(config, "configs/vision/vit.py", "smoke", {})
    request = sweeping.Request(axes=tuple(parse(said) for said in axes), **request)
    return sweeping.run(loaded, request, str(out), stop or StopFlag())


def table(out):
    return json.loads((out / "sweep.json").read_text())


def test_a_grid_is_trained_and_put_in_order(trained, tmp_path, capsys):
    out = tmp_path / "out"
    assert swept(out, "optimizer.lr=1e-3,1e-2,1e-1") == 0
    assert len(trained()) == 3
    assert table(out)[0]["point"] == {"optimizer.lr": "1e-2"}
    assert table(out)[0]["value"] == pytest.approx(1 / 90)
    assert "best      optimizer.lr=1e-2" in capsys.readouterr().out
    page = (out / "report.html").read_text()
    assert page.count("<img") == 2
    assert "--config.optimizer.lr=1e-2" in page
    assert swept(out, "optimizer.lr=1e-3,1e-2,1e-1") == 0
    assert len(trained()) == 3  # nothing anew
    assert swept(out, "optimizer.lr=1e-3,1e-2,1e-1", metric="test/perplexity") == 0
    assert len(trained()) == 3
    assert table(out)[0]["point"] == {"optimizer.lr": "1e-3"}


def test_the_metric_is_the_evaluators_own_or_one_that_is_there(trained, tmp_path):
    swept(tmp_path / "out", "optimizer.lr=1e-3,1e-2", metric=None)
    assert table(tmp_path / "out")[0]["metric"] == "test/perplexity"
    assert table(tmp_path / "out")[0]["point"] == {"optimizer.lr": "1e-3"}
    with pytest.raises(UsageError, match="test/accuracy is none of test/loss, test/perplexity"):
        swept(tmp_path / "other", "optimizer.lr=1e-3", metric="test/accuracy")


def test_halving_gives_the_best_more_steps(trained, tmp_path):
    swept(tmp_path / "out", "optimizer.lr=log:1e-4:1", trials=9, halving=3)
    steps = [line.split()[1] for line in trained()]
    assert [steps.count(n) for n in ("10", "30", "90")] == [9, 3, 1]
    found = table(tmp_path / "out")
    assert [row["rung"] for row in found] == [2] + [1] * 3 + [0] * 9
    first = sorted((row["value"], row["trial"]) for row in found if row["rung"] == 0)
    assert {row["trial"] for row in found if row["rung"] == 1} == {trial for _, trial in first[:3]}
    assert found[0]["trial"] == first[0][1]


def test_a_run_that_fails_is_named_and_the_others_are_kept(trained, tmp_path):
    with pytest.raises(RunError, match=r"1 runs failed, the table holds the others\. 2: the loss is not"):
        swept(tmp_path / "out", "optimizer.lr=1e-2,5")
    assert len(table(tmp_path / "out")) == 1
    with pytest.raises(RunError, match="all 1 runs failed"):
        swept(tmp_path / "none", "optimizer.lr=7")


def test_what_the_config_refuses_ends_the_sweep(trained, tmp_path):
    with pytest.raises(UsageError, match=r"optimizer.lr=1: config\.optimizer\.lr is too large"):
        swept(tmp_path / "out", "optimizer.lr=1,1e-2")


def test_a_sweep_that_is_stopped_goes_on_where_it_was(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("TRAIN_SECONDS", "1")
    stop = StopFlag()
    asked = threading.Timer(1.7, lambda: setattr(stop, "_requested_at", 0.0))
    asked.start()
    with pytest.raises(Preempted):
        swept(tmp_path / "out", "optimizer.lr=1e-3,1e-2,1e-1,0.5", processes=1, stop=stop)
    asked.join()
    monkeypatch.setenv("TRAIN_SECONDS", "0")
    done = len(list((tmp_path / "out").rglob("result.json")))
    assert done < 4
    before = len(trained())
    swept(tmp_path / "out", "optimizer.lr=1e-3,1e-2,1e-1,0.5", processes=1)
    assert len(trained()) - before == 4 - done
    assert len(table(tmp_path / "out")) == 4


def test_so_many_run_at_a_time(tmp_path):
    jobs = [
        Job("timeit", ("-n1", "-r1", "-s", "import time", "time.sleep(0.4)"), tmp_path / f"{i}")
        for i in range(4)
    ]
    most, ended = [0], []
    run_all(jobs, 2, StopFlag(), lambda *said: ended.append(said), lambda running: most.append(len(running)))
    assert max(most) == 2
    assert [code for _, code, _ in ended] == [0] * 4
    assert "1 loop" in ended[0][2]


def test_what_ran_for_a_part_of_the_steps_is_not_taken_for_a_whole_run(trained, tmp_path):
    out, rates = tmp_path / "out", "optimizer.lr=1e-3,1e-2,1e-1"
    swept(out, rates, halving=3)
    assert [line.split()[1] for line in trained()] == ["30"] * 3 + ["90"]
    swept(out, rates)
    assert [line.split()[1] for line in trained()[4:]] == ["90"] * 2  # the third is there
    assert [row["share"] for row in table(out)] == [1.0] * 3


@pytest.mark.slow
def test_two_real_runs(tmp_path):
    output, _ = drive(
        "compare",
        "--config=configs/vision/vit.py:smoke",
        f"--out={tmp_path / 'out'}",
        "--sweep=optimizer.lr=1e-3,1e-2",
        "--config.train.steps=6 steps",
    )
    assert "test/accuracy" in output
    assert len(table(tmp_path / "out")) == 2
    _, errors = drive(
        "compare", "--config=configs/vision/vit.py:smoke", f"--out={tmp_path}", "--trials=3", code=2
    )
    assert "name a key with --sweep" in errors
