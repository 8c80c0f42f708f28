"""What importing the library may and may not do, and how long it takes."""

import subprocess
import sys
import tomllib

from tests.experiments.driver import ROOT

CODE = """
import os, socket, sys, time
began = time.perf_counter()
import jax  # where libtpu is installed, this alone sets variables for it
before = dict(os.environ)
def refuse(*arguments, **keywords):
    raise AssertionError("a network connection at import")
socket.socket.connect = refuse
import effjax.experiment, effjax.train.loop, effjax.measure, effjax.catalog
took = time.perf_counter() - began
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "a device was touched"
assert dict(os.environ) == before, "the environment was changed"
heavy = {"libtpu", "tensorflow", "torch", "matplotlib", "sklearn", "tokenizers", "beartype"}
heavy &= set(sys.modules)
assert not heavy, heavy
print(took)
"""


def test_import_touches_nothing_and_is_quick():
    # One of three: a busy machine may be slow, but a slow import is never fast.
    command = [sys.executable, "-c", CODE]
    assert any(
        float(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout) < 3.0
        for _ in range(3)
    )


def test_files_are_of_one_concept():
    """No file of the library or the drivers is longer than 500 lines, most are far shorter."""
    files = [f for room in ("effjax", "experiments", "configs") for f in (ROOT / room).rglob("*.py")]
    lengths = {f.relative_to(ROOT): len(f.read_text().splitlines()) for f in files}
    assert {name: n for name, n in lengths.items() if n > 500} == {}


def test_dependencies_are_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    names = [
        *project["dependencies"],
        *(d for group in ("dev", "text", "low-precision", "tpu-aot", "cuda-aot") for d in extras[group]),
    ]
    pins = (ROOT / ".ci" / "constraints.txt").read_text().lower().replace("_", "-")
    for requirement in names:
        if requirement.startswith("effjax["):
            continue
        name = requirement.split(">=")[0].strip().lower().replace("_", "-")
        assert f"\n{name}==" in pins, name
