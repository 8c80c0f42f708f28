"""Runs of several processes: real ones, on this machine, with two devices each."""

import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time

import pytest
import yaml

from effjax.errors import UsageError
from experiments.run import processes
from tests.experiments.driver import ROOT, drive
from tests.experiments.several import CONFIG, children, launched, trained_rows, until

FOUR = "--xla_force_host_platform_device_count=4"

pytestmark = pytest.mark.slow


def test_a_run_of_two_processes_stops_as_one_and_goes_on_as_one(tmp_path):
    """Told to stop in one of two processes with two devices each; ended in one process with another mesh."""
    run, straight = tmp_path / "run", tmp_path / "straight"
    steps = "--config.train.steps=60 steps"
    more = ("--config.mesh.data=2", "--config.mesh.tensor=2")
    running = launched(steps, *more, f"--workdir={run}")
    until(lambda: (run / "metrics.jsonl").is_file() and len(trained_rows(run)) > 3)
    os.kill(children(running)[1], signal.SIGTERM)
    output, errors = running.communicate(timeout=120)
    assert running.returncode == 75, output + errors
    assert output.count("told to stop: saved at step") == 2
    stopped = max(trained_rows(run))
    assert 3 < stopped < 60
    drive(
        "train",
        *CONFIG,
        steps,
        "--config.mesh.fsdp=4",
        "--config.mesh.data=1",
        f"--workdir={run}",
        XLA_FLAGS=FOUR,
    )
    drive("train", *CONFIG, steps, f"--workdir={straight}")
    ours, theirs = trained_rows(run), trained_rows(straight)
    assert list(ours) == list(theirs) == list(range(1, 61))
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_where_one_dies_the_others_stop_and_say_why(tmp_path):
    running = launched("--config.train.steps=100000 steps", f"--workdir={tmp_path / 'run'}")
    until(lambda: (tmp_path / "run" / "metrics.jsonl").is_file())
    began = time.monotonic()
    os.kill(children(running)[1], signal.SIGKILL)
    output, errors = running.communicate(timeout=120)
    assert running.returncode == 137
    assert time.monotonic() - began < 60
    assert "process 1 was killed by signal 9" in errors
    assert "another" in output


def pair(workdir, *own):
    """Two processes that find each other; `own` are flags and environment of each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    started = []
    for index, (flags, environment) in enumerate(own):
        said = {processes.COORDINATOR: address, processes.COUNT: "2", processes.INDEX: str(index)}
        command = (sys.executable, "-m", "experiments.train", *CONFIG, *flags, f"--workdir={workdir}")
        started.append(
            subprocess.Popen(
                command, cwd=ROOT, env=os.environ | said | environment, stderr=subprocess.PIPE, text=True
            )
        )
    return started


def test_processes_that_disagree_say_in_what(tmp_path):
    both = pair(tmp_path / "run", (["--config.train.seed=1"], {}), (["--config.train.seed=2"], {}))
    for process in both:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 2
        assert "config.train.seed: 1 on process 0" in errors
        assert "2 on process 1" in errors
    assert not (tmp_path / "run").exists()


def test_a_process_that_fails_by_itself_does_not_wait_for_the_others(tmp_path):
    file = tmp_path / "file"
    file.write_text("no folder")
    well, wrong = pair(tmp_path / "run", ([], {}), ([], {"TFDS_DATA_DIR": str(file)}))
    _, errors = wrong.communicate(timeout=60)
    assert wrong.returncode in (1, 2)
    assert str(file) in errors
    began = time.monotonic()
    _, errors = well.communicate(timeout=120)
    assert time.monotonic() - began < 60
    assert well.returncode != 0
    assert "another" in errors


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({processes.COUNT: "2"}, "needs all three"),
        ({processes.COORDINATOR: "a:1", processes.COUNT: "two", processes.INDEX: "0"}, "is no number"),
        ({processes.COORDINATOR: "a:1", processes.COUNT: "2", processes.INDEX: "2"}, "cannot be joined"),
    ],
)
def test_half_of_an_address_is_refused(monkeypatch, said, message):
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        processes.join()


def test_alone_is_alone(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "4")  # the script around `srun`
    processes.join()
    assert not processes.several()
    assert processes.first()
    assert processes.by_first(lambda: "done") == "done"


def test_launchers_start_configs_that_there_are():
    folder = ROOT / "experiments" / "launchers"
    manifest = yaml.safe_load((folder / "jobset.yaml").read_text())
    (job,) = manifest["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    said = {"jobset.yaml": " ".join(container["command"] + container["args"])}
    for script in folder.glob("*.sh"):
        subprocess.run(["bash", "-n", script], check=True)
        said[script.name] = script.read_text()
    assert len(said) == 3
    for name, text in said.items():
        assert "-m experiments.train" in text, name
        file, variant = re.search(r"(configs/[\w/]+\.py):(\w+)", text).groups()
        assert variant in runpy.run_path(str(ROOT / file))["VARIANTS"], name
