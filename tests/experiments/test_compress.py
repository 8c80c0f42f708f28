"""`experiments.compress`: a run, a recipe, and the run that is left."""

import json
import signal
import time

import pytest

from effjax.compress.storage.trees import held_bytes, stored_in
from experiments.run.restore import load_run
from tests.experiments.driver import drive, manifest, start

RECIPE = "--recipe=configs/compress/round.py:int4"
GROUP = "--recipe.steps[0].layout.group=8"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("lm") / "run"
    drive("train", "--config=configs/language/lm.py:smoke", f"--workdir={workdir}")
    return workdir


@pytest.mark.slow
def test_what_is_left_is_a_run_like_any_other(trained, tmp_path):
    small = tmp_path / "small"
    out, _ = drive("compress", f"--workdir={trained}", RECIPE, GROUP, f"--out={small}", "--rounds=1")
    for told in (
        "bytes of the weights",
        "bits a parameter",
        "perplexity",
        "time of a token",
        "a product with each",
    ):
        assert told in out
    assert "Compressed" in (small / "report.html").read_text()
    assert json.loads((small / "recipe.json").read_text())["recipe"]["steps"][0]["layout"]["group"] == 8
    _, held = load_run(small)
    _, before = load_run(trained)
    assert all(path.startswith("blocks/") for path in stored_in(held["params"]))
    assert held_bytes(held["params"]["blocks"]) < 0.35 * held_bytes(before["params"]["blocks"])
    # What the driver said of the weights in memory is what the run says that is read back.
    (said,) = map(json.loads, (small / "metrics.jsonl").read_text().splitlines())
    again, _ = drive("evaluate", f"--workdir={small}")
    assert f"{said['perplexity']:.4g}" in again
    text, _ = drive("generate", f"--workdir={small}", "--prompt=Return", "--max_new=3", "--temperature=0")
    assert text.startswith("Return")

    _, error = drive("compress", f"--workdir={small}", RECIPE, f"--out={tmp_path / 'b'}", code=2)
    assert "leaves no kernel to store" in error
    _, error = drive("compress", f"--workdir={trained}", RECIPE, GROUP, f"--out={trained}", code=2)
    assert "another config" in error or "holds a run already" in error


@pytest.mark.slow
def test_what_does_not_fit_is_refused_before_anything_is_written(trained, tmp_path):
    out = tmp_path / "out"

    def refused(*flags):
        return drive("compress", f"--workdir={trained}", f"--out={out}", *flags, code=2)[1]

    assert "does not divide the" in refused(RECIPE, "--recipe.steps[0].layout.group=7")
    assert "matches no parameter" in refused(RECIPE, "--recipe.steps[0].kernels=('blcks/.*',)")
    assert "--recipe: 'configs/compress/round.py' has no variant 'int5'" in refused(
        "--recipe=configs/compress/round.py:int5"
    )
    assert "--recipe is missing" in refused()
    assert not out.exists()


@pytest.mark.slow
def test_a_recipe_goes_on_behind_its_last_whole_step(trained, tmp_path):
    file = tmp_path / "two.py"
    file.write_text(
        "from configs.compress.prune import ConfigDict, get_config as half\n"
        "def get_config():\n"
        "    first = dict(half('random-once').steps[0], least=dict(hidden=3, hidden_step=1))\n"
        "    return ConfigDict(dict(steps=(first, dict(kind='recover', how=dict(steps=STEPS)))))\n"
    )
    text = file.read_text()
    run = (f"--workdir={trained}", f"--recipe={file}", "--rounds=1")
    out, whole = tmp_path / "out", tmp_path / "whole"
    file.write_text(text.replace("STEPS", "8"))
    said, _ = drive("compress", *run, f"--out={whole}")
    assert "Prune, step 1 of 2." in said
    # Stopped in the second step.
    file.write_text(text.replace("STEPS", "100000"))
    running = start("compress", *run, f"--out={out}")
    stage = tmp_path / "out.steps" / "1"
    deadline = time.monotonic() + 120
    while not list(stage.rglob("checkpoints/*/manifest")) and time.monotonic() < deadline:
        time.sleep(0.1)
    running.send_signal(signal.SIGKILL)
    running.communicate(timeout=120)
    assert not out.exists()
    # The same first step, of whichever second.
    file.write_text(text.replace("STEPS", "8"))
    said, _ = drive("compress", *run, f"--out={out}")
    assert "going on behind step 1 of 2" in said
    assert "Prune, step 1" not in said
    assert not stage.parent.exists()
    assert manifest(out) == manifest(whole)
    # What somebody else keeps under that name stays.
    theirs = tmp_path / "out.steps" / "mine.txt"
    theirs.parent.mkdir()
    theirs.write_text("notes")
    # Again: nothing but the report.
    said, _ = drive("compress", *run, f"--out={out}")
    assert "step 1 of 2" not in said
    assert "MACs an example" in said
    assert theirs.read_text() == "notes"
    file.write_text(text.replace("STEPS", "9"))
    _, error = drive("compress", *run, f"--out={out}", code=2)
    assert "holds a run already" in error
