"""Runs that are killed, stopped, poisoned and damaged through the driver, as clusters and disks do it."""

import random
import resource
import shutil
import signal
import time

import pytest

from tests.experiments.driver import COMPILED, drive, manifest, metric_rows, start
from tests.train.toy import FAMILIES

CONFIG = {family: f"--config={module.replace('.', '/')}.py:smoke" for family, module in FAMILIES.items()}
OFTEN = ["--config.train.steps=60 steps", "--config.train.checkpoint_every=5 steps", "--config.train.keep=30"]


def wait_for(condition, process, seconds=120):
    """Waits until a condition holds; fails if the process ends first."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def saved(workdir):
    folder = workdir / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.exists() else []


def last_step(workdir):
    """The newest logged step; 0 before the first."""
    file = workdir / "metrics.jsonl"
    return metric_rows(workdir)[-1]["step"] if file.exists() and file.stat().st_size else 0


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_kill_9_and_resume_is_the_straight_run_bit_by_bit(family, tmp_path):
    arguments = [CONFIG[family], *OFTEN]
    drive("train", *arguments, f"--workdir={tmp_path / 'straight'}")
    workdir = tmp_path / "killed"
    # What the straight run compiled; a copy, because a process may be killed while it writes there.
    programs = shutil.copytree(COMPILED, tmp_path / "compiled")
    for least in (5, 25):
        process = start("train", *arguments, f"--workdir={workdir}", compiled=programs)
        wait_for(lambda least=least: any(step >= least for step in saved(workdir)), process)
        time.sleep(random.random() * 0.2)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    out, _ = drive("train", *arguments, f"--workdir={workdir}")
    assert "resuming at step" in out
    assert manifest(workdir) == manifest(tmp_path / "straight"), "parameters, moments, keys, data position"
    straight, resumed = (
        [(r["step"], r["loss"]) for r in metric_rows(tmp_path / name) if r["split"] == "train"]
        for name in ("straight", "killed")
    )
    assert straight == resumed, "no line lost, none twice"


@pytest.mark.slow
def test_sigterm_at_any_moment_leads_to_75_and_a_resumable_run(tmp_path):
    workdir = tmp_path / "run"
    arguments = [CONFIG["vision"], "--config.train.steps=100k steps", f"--workdir={workdir}"]
    # While importing, while compiling, in the first steps, later.
    for delay in (0.4, 1.5, 3.0, 5.0, 8.0):
        process = start("train", *arguments)
        time.sleep(delay)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 75, (delay, out, err)
        assert "stopped: " in err
    # And twice while it trains, the second time from where the first one stopped.
    logged = last_step(workdir)
    for _ in range(2):
        reached = saved(workdir)[-1] if saved(workdir) else 0
        process = start("train", *arguments, compiled=tmp_path / "compiled")
        wait_for(lambda logged=logged: last_step(workdir) > logged, process)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 75
        assert saved(workdir)[-1] > reached
        logged = last_step(workdir)
    assert f"resuming at step {reached}" in out


@pytest.mark.slow
def test_a_damaged_checkpoint_is_said_and_the_one_before_it_used(tmp_path):
    workdir = tmp_path / "run"
    steps = "--config.train.steps=20 steps"
    drive("train", CONFIG["vision"], steps, f"--workdir={workdir}")
    assert saved(workdir) == [10, 20]
    before = manifest(workdir, 20)
    largest = max((workdir / "checkpoints" / "20" / "state").rglob("*"), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    out, _ = drive("train", CONFIG["vision"], steps, f"--workdir={workdir}")
    assert "The checkpoint of step 20 is damaged" in out
    assert "resuming at step 10" in out
    assert manifest(workdir, 20) == before, "trained again to the same state"


@pytest.mark.slow
def test_a_bad_number_stops_the_run_and_can_be_replayed(tmp_path):
    workdir = tmp_path / "run"
    # A learning rate that no network survives.
    _, err = drive(
        "train",
        CONFIG["vision"],
        "--config.optimizer.lr=1e15",
        "--config.optimizer.schedule.warmup=0 steps",
        f"--workdir={workdir}",
        code=1,
    )
    assert "is not finite" in err
    (folder,) = (workdir / "replay").iterdir()
    step = int(folder.name.removeprefix("step_"))
    assert f"step {step}: " in err
    assert f"--replay={folder}" in err
    assert saved(workdir) == [step - 1]
    out, _ = drive("train", f"--replay={folder}", code=1)
    assert "first offender: " in out
    assert "gradient/blocks/mixer/query/kernel" in out


@pytest.mark.slow
def test_a_full_disk_is_named_and_nothing_is_lost(tmp_path):
    workdir = tmp_path / "run"
    arguments = [CONFIG["vision"], *OFTEN, f"--workdir={workdir}"]
    process = start("train", *arguments)
    wait_for(lambda: len(saved(workdir)) >= 2, process)
    # From here on no file may grow past a few bytes, which is what a full disk looks like to a writer.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100, 100))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert err.startswith("error: ")
    assert "Traceback" not in err
    out, _ = drive("train", *arguments)
    assert "resuming at step" in out
