"""Runs a driver as a person does: in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def command(name, *arguments):
    return [sys.executable, "-m", f"experiments.{name}", *map(str, arguments)]


def drive(name, *arguments, code=0, **environment):
    """Runs a driver to its end and checks the exit code; returns (output, errors)."""
    done = subprocess.run(
        command(name, *arguments),
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    if code in (1, 2, 75):
        assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


def start(name, *arguments):
    """Starts a driver; the caller ends it."""
    return subprocess.Popen(
        command(name, *arguments), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def manifest(workdir, step=None):
    """The fingerprints of every array of a checkpoint, by path."""
    folder = Path(workdir) / "checkpoints"
    steps = sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())
    found = next((folder / str(steps[-1] if step is None else step) / "manifest").rglob("*"))
    return json.loads(found.read_text())["leaves"]


def metric_rows(workdir):
    return [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
