"""Promises about files that are not small; each in a process of its own, whose peak is its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_memory_and_time_of_a_file_of_250_megabytes(dtype):
    arguments = ["5"] if dtype is None else ["5", dtype]
    done = subprocess.run(
        [sys.executable, "-m", "tests.interop.measure", *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    took = json.loads(done.stdout)
    assert took["file"] > 250e6
    assert took["result"] == pytest.approx(took["file"] / (1 if dtype is None else 2), rel=1e-3)
    assert took["grown"] < took["result"] + 2 * took["largest"]
    if dtype is None:
        assert took["load"] < 1.5 * 2 * took["read"]
