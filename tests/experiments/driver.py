"""Runs a driver as a person does: in a process of its own.

What a driver imports takes as long as a small run does, and what it compiles twice as long. So `drive` forks
a process that has imported the libraries, ours among them, and reads what an earlier one compiled of the same
program; `start` takes a new process, and reads only from where it is told to.
"""

import atexit
import gc
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import jax

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 300

# That of the tests' own processes. Who meets a file that another is still writing compiles for himself.
COMPILED = ROOT / ".testdata" / "compiled" / "tests"

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "experiments.run.accelerating",
        "experiments.run.comparing",
        "experiments.run.sampling",
        "experiments.run.training",
        "experiments.run.writing",
        "matplotlib.backends.backend_agg",
        "matplotlib.figure",
    ]
)


def command(name, *arguments):
    return [sys.executable, "-m", f"experiments.{name}", *map(str, arguments)]


def drive(name, *arguments, code=0, **environment):
    """Runs a driver to its end and checks the exit code; returns (output, errors)."""
    ended, output, errors = _forked(name, [str(argument) for argument in arguments], os.environ | environment)
    assert ended == code, f"exit code {ended}\n{output}\n{errors}"
    if code in (1, 2, 75):
        assert "Traceback" not in errors
    return output, errors


def _forked(name, arguments, environment):
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder, stream) for stream in ("output", "errors")]
        process = FORKS.Process(target=_run, args=(name, arguments, dict(environment), *said))
        process.start()
        process.join(SECONDS)
        if process.exitcode is None:
            process.kill()
            process.join()
            shutil.rmtree(COMPILED, ignore_errors=True)  # it may have been writing there
        return process.exitcode, *(path.read_text() for path in said)


def _run(name, arguments, environment, output, errors):
    """The forked process: what `python -m` would do."""
    for stream, path in enumerate((os.devnull, output, errors)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.freeze()  # what was imported is not looked through again, and what is traced seldom
    gc.set_threshold(50_000, 20, 50)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    jax.config.update("jax_platforms", environment["JAX_PLATFORMS"] or None)  # no device is open yet
    jax.config.update("jax_compilation_cache_dir", str(COMPILED))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    os.environ.update(_cache(COMPILED))  # for processes that the driver starts
    sys.argv = [name, *arguments]
    try:
        runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # a forked process does not do it by itself
        sys.stdout.flush()
        sys.stderr.flush()


def _cache(folder):
    return {"JAX_COMPILATION_CACHE_DIR": str(folder), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def start(name, *arguments, compiled=None):
    """Starts a driver; the caller ends it. What is in the folder `compiled` is not compiled again."""
    return subprocess.Popen(
        command(name, *arguments),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | (_cache(compiled) if compiled else {}),
    )


def manifest(workdir, step=None):
    """The fingerprints of every array of a checkpoint, by path."""
    folder = Path(workdir) / "checkpoints"
    steps = sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())
    found = next((folder / str(steps[-1] if step is None else step) / "manifest").rglob("*"))
    return json.loads(found.read_text())["leaves"]


def metric_rows(workdir):
    return [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
