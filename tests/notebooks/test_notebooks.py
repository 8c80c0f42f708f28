"""Every notebook runs from its first cell to its last, and is committed without outputs."""

import json
import os
import subprocess
import sys

import pytest

from tests.experiments.driver import COMPILED, ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# In the place of IPython, where there is none: pictures are looked at, not shown.
STAND_IN = """
import sys, types

class Image:
    def __init__(self, filename):
        with open(filename, "rb") as file:
            assert file.read(8) == b"\\x89PNG\\r\\n\\x1a\\n", filename
        self.filename = filename

shown = types.ModuleType("IPython.display")
shown.Image, shown.display = Image, lambda picture: print("shown", picture.filename)
sys.modules["IPython.display"] = shown  # without the whole, which matplotlib would take for a terminal's
"""


def cells(notebook):
    return json.loads(notebook.read_text())["cells"]


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(notebook, tmp_path):
    """With what it says of itself is its small case."""
    script, shows = [STAND_IN], 0
    for cell in cells(notebook):
        if cell["cell_type"] == "code":
            script += ["".join(cell["source"]), cell["metadata"].get("smoke", "")]
            shows += script[-2].count("show(")
    file = tmp_path / "notebook.py"
    file.write_text("\n\n".join(script))
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(COMPILED),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    ended = subprocess.run(
        [sys.executable, file], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    assert ended.stdout.count("shown ") >= shows > 0


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_kept_without_outputs(notebook):
    for cell in cells(notebook):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
    assert sum("smoke" in cell["metadata"] for cell in cells(notebook)) == 1
    assert cells(notebook)[0]["source"][0].startswith(f"# {notebook.name[0]}. ")
