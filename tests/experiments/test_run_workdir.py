import errno
import fcntl
import json
import os
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from effjax.errors import RunError, UsageError
from experiments.run import workdir as workdir_module
from experiments.run.workdir import Workdir, differences

CONFIG = ConfigDict(
    {
        "seed": 0,
        "steps": 100,
        "optimizer": {"lr": 1e-3, "b": (0.9, 0.99)},
        "stages": ({"depth": 2}, {"depth": 4}),
    }
)


def start(path, config=CONFIG, **options):
    given = {"command": "python -m experiments.train", "config_file": "configs/a.py:smoke", **options}
    return Workdir.create_or_resume(path, config, **given)


def changed(**values):
    return ConfigDict({**CONFIG.to_dict(), **values})


def test_a_new_folder_holds_the_record(tmp_path):
    with start(tmp_path / "deep" / "run", devices=["CPU 0"]) as workdir:
        assert not workdir.resumed
        assert workdir.write("report.html", "<p>").read_text() == "<p>"
    record = json.loads((workdir.path / "config.json").read_text())
    assert record["command"] == "python -m experiments.train"
    assert record["config_file"] == "configs/a.py:smoke"
    assert record["config"]["stages"][1] == {"depth": 4}
    environment = json.loads((workdir.path / "environment.json").read_text())
    assert environment["devices"] == ["CPU 0"]
    assert environment["versions"]["jax"]
    assert environment["python"] == ".".join(map(str, sys.version_info[:3]))
    assert environment["earlier"] == []


def test_the_same_config_resumes_and_keeps_the_earlier_environment(tmp_path):
    start(tmp_path, devices=["8 chips"]).close()
    start(tmp_path, devices=["4 chips"]).close()
    with start(tmp_path, devices=["2 chips"]) as workdir:
        assert workdir.resumed
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["devices"] == ["2 chips"]
    assert [start["devices"] for start in environment["earlier"]] == [["8 chips"], ["4 chips"]]
    assert all("earlier" not in start for start in environment["earlier"])


def test_another_config_is_refused_with_keys_values_and_a_free_name(tmp_path):
    start(tmp_path / "vit").close()
    (tmp_path / "vit-2").mkdir()
    before = (tmp_path / "vit" / "config.json").read_text()
    with pytest.raises(UsageError) as caught:
        start(tmp_path / "vit", changed(seed=7, stages=({"depth": 2}, {"depth": 5}), extra=1))
    message = str(caught.value)
    assert "config.seed: 0 -> 7" in message
    assert "config.stages[1].depth: 4 -> 5" in message
    assert "config.extra: absent -> 1" in message
    assert "config.optimizer" not in message
    assert f"--workdir={tmp_path / 'vit-3'}" in message
    assert (tmp_path / "vit" / "config.json").read_text() == before
    start(tmp_path / "vit").close()  # the refusal has let go of the lock


def test_allowed_keys_and_their_sections_may_change(tmp_path):
    start(tmp_path).close()
    longer = changed(steps=200, optimizer={"lr": 1e-3, "b": (0.9, 0.95)})
    with start(tmp_path, longer, allowed=("config.steps", "config.optimizer")) as workdir:
        assert workdir.resumed
    assert json.loads((tmp_path / "config.json").read_text())["config"]["steps"] == 200
    # A prefix is a whole key: "config.step" does not open "config.steps".
    with pytest.raises(UsageError, match=r"config\.steps: 200 -> 100"):
        start(tmp_path, allowed=("config.step", "config.optimizer"))


def test_differences_tells_types_apart():
    assert differences({"a": 1}, {"a": 1.0}) == {"config.a": (1, 1.0)}
    assert differences({"a": 1}, {"a": True}) == {"config.a": (1, True)}
    assert differences({"a": [1, [2]]}, {"a": [1, [2]]}) == {}
    assert differences({"a": [1]}, {"a": [1, 2]}) == {"config.a": ([1], [1, 2])}


def test_two_runs_in_one_folder_are_refused_by_the_pid_of_the_first(tmp_path):
    with (
        start(tmp_path / "run"),
        pytest.raises(UsageError, match=rf"Process {os.getpid()} is running in .*run-2"),
    ):
        start(tmp_path / "run")


def test_a_killed_run_leaves_no_lock_behind(tmp_path):
    program = (
        "import os, sys\nfrom experiments.run.workdir import Workdir\n"
        "w = Workdir.create_or_resume(sys.argv[1], {'a': 1}, command='c', config_file='f')\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)])
    assert done.returncode == -9
    assert (tmp_path / "lock").exists()
    with start(tmp_path, {"a": 1}) as workdir:
        assert workdir.resumed


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UsageError, match=r"not empty \('thesis\.tex' lies there\)"):
        start(tmp_path)
    with pytest.raises(UsageError, match="is a file"):
        start(tmp_path / "thesis.tex")


def test_a_start_that_died_half_way_is_begun_anew(tmp_path):
    for name in ("lock", ".config.json.17-3.tmp"):
        (tmp_path / name).touch()
    with start(tmp_path) as workdir:
        assert not workdir.resumed
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_value_that_is_no_plain_data_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"config\.model\.activation is a builtin_function"):
        start(tmp_path, {"model": {"activation": abs}})


def test_damaged_records_are_named(tmp_path):
    start(tmp_path).close()
    (tmp_path / "environment.json").write_text("{")
    with pytest.raises(RunError, match=r"environment\.json' is damaged"):
        start(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(RunError, match=r"config\.json' is damaged"):
        start(tmp_path)


def test_a_refusing_file_system_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(RunError, match=r"run/lock': No locks available"):
        start(tmp_path / "run")
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"file/run': Not a directory"):
        start(tmp_path / "file" / "run")


def test_the_git_revision_is_that_of_this_source_or_none(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    file = tmp_path / "experiments" / "run" / "workdir.py"
    file.parent.mkdir(parents=True)
    file.write_text("1")
    monkeypatch.setattr(workdir_module, "__file__", str(file))
    assert workdir_module._git_revision() is None
    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    revision = workdir_module._git_revision()
    assert len(revision) == 40
    file.write_text("2")
    assert workdir_module._git_revision() == revision + "-dirty"
    # As installed into a virtual environment that lies inside somebody's repository.
    inner = tmp_path / "lib" / "experiments" / "run" / "workdir.py"
    monkeypatch.setattr(workdir_module, "__file__", str(inner))
    inner.parent.mkdir(parents=True)
    assert workdir_module._git_revision() is None
