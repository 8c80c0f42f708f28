"""`experiments.compare`: trained, measured, resumed, and asked wrongly."""

import json
import signal
import time

import pytest

from tests.experiments.driver import drive, start

CONFIGS = "--config=configs/vision/vit.py:smoke,configs/vision/swin.py:smoke"
METHOD = "--method=tome:remove=2"
PRUNE = "configs/compress/prune.py:taylor"


@pytest.mark.slow
def test_configs_and_methods_stand_in_one_table_and_nothing_is_done_twice(tmp_path):
    first, _ = drive("compare", CONFIGS, METHOD, "--rounds=1", f"--out={tmp_path}")
    table = json.loads((tmp_path / "compare.json").read_text())
    vit, swin = "configs/vision/vit.py:smoke", "configs/vision/swin.py:smoke"
    assert list(table) == [vit, f"{vit} tome:remove=2", swin]
    assert table[f"{vit} tome:remove=2"]["macs"] < table[vit]["macs"]
    for name in ("accuracy_macs.png", "accuracy_seconds.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "compare.md").read_text().count("\n") == 5
    assert "tome:remove=2" in (tmp_path / "report.html").read_text()
    assert first.count("  complete") == 0
    again, _ = drive("compare", CONFIGS, METHOD, "--rounds=1", f"--out={tmp_path}")
    assert again.count("  complete") == 2
    assert json.loads((tmp_path / "compare.json").read_text()) == table

    # What fails is named, and the others stand in the table.
    out, errors = drive(
        "compare", CONFIGS, "--method=tome:remove=99", "--rounds=1", f"--out={tmp_path}", code=1
    )
    assert "1 of 2 failed" in errors
    assert "remove=99 asks for more tokens than the 16" in errors
    assert swin in out
    assert list(json.loads((tmp_path / "compare.json").read_text())) == [swin]


@pytest.mark.slow
def test_a_stop_is_handed_on_and_the_same_command_goes_on(tmp_path):
    arguments = (
        "compare",
        "--config=configs/vision/vit.py:smoke",
        "--config.train.steps=100000 steps",
        f"--out={tmp_path}",
    )
    running = start(*arguments)
    metrics = lambda: list(tmp_path.rglob("metrics.jsonl"))
    deadline = time.monotonic() + 120
    while not metrics() and time.monotonic() < deadline:
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 75
    assert "Run the same command again" in errors
    assert list(tmp_path.rglob("checkpoints/*/state"))


@pytest.mark.slow
def test_what_recipes_leave_stands_beside_the_run(tmp_path):
    config = "--config=configs/vision/vit.py:smoke"
    recipe = "configs/compress/prune.py:random-once steps[0].least.hidden_step=1 steps[0].left="
    recipes = [f"--recipe={recipe}{left}" for left in (0.5, 0.75)]
    _, _ = drive("compare", config, *recipes, "--rounds=1", f"--out={tmp_path}")
    table = json.loads((tmp_path / "compare.json").read_text())
    whole, half, more = table.values()
    assert list(table)[1].endswith("steps[0].left=0.5")
    assert half["macs"] <= 0.5 * whole["macs"] < more["macs"] <= 0.75 * whole["macs"]
    again, _ = drive("compare", config, *recipes, "--rounds=1", f"--out={tmp_path}")
    assert again.count("complete") == 3


def test_wrong_requests_are_one_line(tmp_path):
    for arguments, message in (
        ((CONFIGS,), "--out is missing"),
        ((f"--out={tmp_path}",), "--config is missing"),
        ((CONFIGS, f"--out={tmp_path}", "--method=tome"), "either keep"),
        ((CONFIGS, f"--out={tmp_path}", "--recipe=configs/compress/prun.py"), "Near: configs/compress/prune"),
        ((CONFIGS, f"--out={tmp_path}", f"--recipe={PRUNE} left 0.5"), "cannot be read"),
        ((CONFIGS, f"--out={tmp_path}", f"--recipe={PRUNE} steps[0].lft=0.5"), "'left'"),
    ):
        _, errors = drive("compare", *arguments, code=2)
        assert message in errors
        assert len(errors.strip().splitlines()) == 1
