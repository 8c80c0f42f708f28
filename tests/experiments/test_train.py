"""Every config file, in its smoke variant, through the drivers a person runs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.experiments.driver import ROOT, drive, metric_rows

CONFIGS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "configs").rglob("*.py")
    if "def get_config(" in path.read_text() and path.parent.name != "compress"  # recipes train nothing
)

# Evaluating knows tasks and no models.
ONE_A_TASK = ("vit", "dit", "lm", "hot")


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Trains a smoke config once a session; returns its workdir."""
    runs = {}

    def get(config):
        if config not in runs:
            workdir = tmp_path_factory.mktemp(Path(config).stem)
            out, _ = drive("train", f"--config={config}:smoke", f"--workdir={workdir}")
            runs[config] = workdir, out
        return runs[config]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_trains_and_leaves_what_a_run_leaves(config, trained):
    workdir, out = trained(config)
    for name in (
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "goodput.jsonl",
        "report.html",
        "plots/loss.png",
    ):
        assert (workdir / name).stat().st_size > 0, name
    assert list((workdir / "events").iterdir())
    assert list((workdir / "checkpoints" / "20").iterdir())
    assert "20/20" in out
    for said in ("parameters", "MACs", "step time", "goodput", str(workdir / "report.html")):
        assert said in out
    rows = metric_rows(workdir)
    losses = [row["loss"] for row in rows if row["split"] == "train"]
    assert losses[-1] < losses[0]
    assert rows[-1]["step"] == 20
    page = (workdir / "report.html").read_text()
    assert "http://" not in page
    assert "https://" not in page
    if (
        Path(config).stem in ONE_A_TASK
    ):  # here, because another test may be given to a worker that has no such run
        evaluated_again_to_the_same_figures(workdir)
    if Path(config).stem == "lm":
        writes_and_is_asked(workdir)


def evaluated_again_to_the_same_figures(workdir):
    out, _ = drive("evaluate", f"--workdir={workdir}")
    last = {row["split"]: row for row in metric_rows(workdir) if row["split"] != "train"}
    for row in last.values():
        value = row["loss"] if "loss" in row else row["frechet"]
        assert f"{value:.4g}" in out


def writes_and_is_asked(workdir):
    out, err = drive(
        "generate", f"--workdir={workdir}", "--prompt=The ", "--prompt=A list", "--max_new=8", "--min_p=0.1"
    )
    assert "The " in out
    assert "A list" in out
    for said in ("time to first token", "tokens a second", "caches"):
        assert said in err
        assert said not in out
    out, _ = drive("evaluate", f"--workdir={workdir}", "--probes=copy,needle", "--lengths=16,32")
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["tokens", "copy", "needle"]
    _, err = drive("evaluate", f"--workdir={workdir}", "--probes=coyp", code=2)
    assert "'coyp', which is no probe. Did you mean 'copy'?" in err
    _, err = drive("evaluate", f"--workdir={workdir}", "--probes=copy", "--lengths=65", code=2)
    assert "--lengths names 65, and the model is made for 64 tokens" in err


@pytest.mark.slow
def test_a_complete_run_says_so_and_trains_no_further(trained):
    workdir, _ = trained("configs/vision/vit.py")
    before = metric_rows(workdir)
    out, _ = drive("train", "--config=configs/vision/vit.py:smoke", f"--workdir={workdir}")
    assert "resuming at step 20" in out
    assert [row for row in metric_rows(workdir) if row["split"] == "train"] == [
        row for row in before if row["split"] == "train"
    ]


@pytest.mark.slow
def test_another_config_in_the_same_workdir_is_refused(trained):
    workdir, _ = trained("configs/vision/vit.py")
    _, err = drive(
        "train",
        "--config=configs/vision/vit.py:smoke",
        "--config.optimizer.lr=0.5",
        f"--workdir={workdir}",
        code=2,
    )
    assert "config.optimizer.lr: 0.01 -> 0.5" in err
    assert "--workdir=" in err


VIT = "--config=configs/vision/vit.py:smoke"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([VIT], "--workdir is missing"),
        ([VIT, "--config.optimizer.lrr=1"], "optimizer.lrr is read by nobody: Muon has no such field."),
        ([VIT, "--config.modle.dim=1"], "config.modle is read by nobody: Experiment has no such field."),
        ([VIT, "--config.model.kind=vti"], "config.model.kind is 'vti', which is no kind."),
        ([VIT, "--config.model.block.mixer.kind=atention"], "config.model.block.mixer.kind is 'atention'"),
        ([VIT, "--config.model.dim=big"], "--config.model.dim is of type int"),
        ([VIT, "--config.train.precision.compute=float16"], "'float16'. Did you mean 'bfloat16'"),
        ([VIT, "--config.train.steps=20"], "'20' is no duration"),
        ([VIT, "--config.data.batch_size=0"], "batch_size=0 must be at least 1"),
        ([VIT, "--config.data.batch_size=5000"], "batch_size=5000 is more than the 1437 examples"),
        ([VIT, "--config.mesh.data=3"], "does not multiply to the 1 devices"),
        ([VIT, "--config.data.source.name=digitz"], "digitz"),
        ([VIT, "--config.data.source.split=trian"], "trian"),
        ([VIT, "--config.model.patch=3"], "cannot be cut into patches of 3 x 3"),
        ([VIT, "--config.optimizer.freeze=('nothing/.*',)"], "'nothing/.*' matches no parameter"),
        (["--replay=nowhere"], "--replay='nowhere' holds no bad step"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_one_message_and_exit_code_2(arguments, said, tmp_path):
    workdir = [] if arguments == [VIT] or "--replay" in arguments[0] else [f"--workdir={tmp_path / 'run'}"]
    _, err = drive("train", *arguments, *workdir, code=2)
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_missing_data_set_says_how_to_prepare_it(tmp_path):
    _, err = drive("train", "--config=configs/vision/vit.py:ti16", f"--workdir={tmp_path / 'run'}", code=2)
    assert "imagenet2012" in err
    assert "prepare" in err


def test_two_runs_in_one_workdir_are_refused(tmp_path):
    from experiments.run.workdir import Workdir

    workdir = tmp_path / "run"
    with Workdir.create_or_resume(workdir, {}, command="", config_file=""):
        _, err = drive("train", VIT, f"--workdir={workdir}", code=2)
    assert "is running in" in err


@pytest.mark.slow
def test_the_record_of_a_run_tells_what_was_run(trained):
    workdir, _ = trained("configs/vision/vit.py")
    record = json.loads((workdir / "config.json").read_text())
    assert record["command"].startswith("python -m experiments.train --config=configs/vision/vit.py:smoke")
    assert record["config"]["model"]["dim"] == 16
    environment = json.loads((workdir / "environment.json").read_text())
    assert environment["devices"] == ["cpu:cpu"]
    assert environment["versions"]["jax"]


DRIVERS = sorted(
    p.stem for p in (ROOT / "experiments").glob("*.py") if p.stem not in ("__init__", "cli", "notebook")
)


@pytest.mark.parametrize("name", DRIVERS)
def test_every_driver_explains_itself(name):
    out, err = drive(name, "--help")
    assert f"python -m experiments.{name}" in out
    assert "--[no]debug" in out
    assert err == ""


@pytest.mark.slow
def test_a_profile_is_written_on_request(tmp_path):
    out, _ = drive("train", VIT, f"--workdir={tmp_path / 'run'}", "--profile=3")
    assert "profile of 3 steps" in out
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


FOLDER_CONFIG = """
from ml_collections import ConfigDict
from configs.vision import vit

def get_config(root="."):
    config = vit.get_config("smoke")
    config.data.source = ConfigDict(dict(kind="image_folder", root=root, mode="L"))
    config.data.batch_size = 8
    config.evaluators = ConfigDict()
    return config
"""


@pytest.fixture
def pictures(tmp_path):
    """A folder of twenty small pictures in two classes, and the config that trains on it."""
    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (tmp_path / "pictures" / label).mkdir(parents=True)
        for number in range(10):
            picture = Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8))
            picture.save(tmp_path / "pictures" / label / f"{number}.png")
    (tmp_path / "config.py").write_text(FOLDER_CONFIG)
    return tmp_path / "pictures", f"--config={tmp_path / 'config.py'}:{tmp_path / 'pictures'}"


@pytest.mark.slow
def test_a_folder_of_pictures_trains(pictures, tmp_path):
    folder, config = pictures
    out, _ = drive("train", config, f"--workdir={tmp_path / 'run'}", "--config.data.max_bad_share=0.2")
    assert "20/20" in out
    (folder / "cat" / "3.png").write_bytes(b"no picture")
    out, _ = drive("train", config, f"--workdir={tmp_path / 'one_bad'}", "--config.data.max_bad_share=0.2")
    assert "unreadable records replaced by the next readable one: 1" in out
    _, err = drive("train", config, f"--workdir={tmp_path / 'too_many'}", code=1)
    assert "3.png" in err
    assert err.count("error: ") == 1


@pytest.mark.slow
def test_an_empty_folder_is_named(pictures, tmp_path):
    folder, config = pictures
    shutil.rmtree(folder / "cat")
    shutil.rmtree(folder / "dog")
    _, err = drive("train", config, f"--workdir={tmp_path / 'run'}", code=2)
    assert str(folder) in err


@pytest.mark.slow
def test_a_failing_evaluator_makes_the_exit_code_1_after_training_is_done(pictures, tmp_path):
    _, config = pictures
    path = tmp_path / "config.py"
    broken = """config.evaluators = ConfigDict(dict(broken=dict(kind="metrics", every="10 steps", data=dict(
        source=dict(kind="tfds", name="digits", split="test"),
        transforms=(dict(kind="resize", size=(16, 16)),),
        batch_size=8,
    ))))"""
    path.write_text(path.read_text().replace("config.evaluators = ConfigDict()", broken))
    # Larger pictures than the position table is for.
    out, err = drive("train", config, f"--workdir={tmp_path / 'run'}", code=1)
    assert "evaluator 'broken' failed at step 20" in out
    assert err == "error: training is complete, but evaluators failed: broken.\n"
    assert (tmp_path / "run" / "report.html").exists()
    assert (tmp_path / "run" / "checkpoints" / "20").exists()
