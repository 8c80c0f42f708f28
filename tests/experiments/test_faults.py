"""Runs whose numbers or files are bad, through the driver; what kills and disks do is in `tests/faults`."""

import pytest

from tests.experiments.driver import drive, manifest
from tests.faults.moments import CONFIG, saved


@pytest.mark.slow
def test_a_damaged_checkpoint_is_said_and_the_one_before_it_used(tmp_path):
    workdir = tmp_path / "run"
    steps = "--config.train.steps=20 steps"
    drive("train", CONFIG["vision"], steps, f"--workdir={workdir}")
    assert saved(workdir) == [10, 20]
    before = manifest(workdir, 20)
    files = [p for p in (workdir / "checkpoints" / "20" / "state").rglob("*") if p.is_file()]
    largest = max(p.stat().st_size for p in files)
    # Of two files as large, orbax reads one: which, it decides anew in every run.
    for file in files:
        if file.stat().st_size > largest // 2:
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 1
            file.write_bytes(data)
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
