import errno
import json
import math
import os
import stat
import subprocess
import sys

import pytest

from effjax.errors import RunError
from experiments.run.files import jsonable, number, sweep, to_json, write_atomic


def test_writes_text_and_bytes_and_makes_the_folder(tmp_path):
    write_atomic(tmp_path / "plots" / "a.png", b"\x89PNG")
    write_atomic(tmp_path / "b.txt", "é\n")
    assert (tmp_path / "plots" / "a.png").read_bytes() == b"\x89PNG"
    assert (tmp_path / "b.txt").read_text(encoding="utf-8") == "é\n"


def test_a_file_is_readable_like_any_other(tmp_path):
    (tmp_path / "plain").touch()
    write_atomic(tmp_path / "ours", "")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "ours")}
    assert len(modes) == 1


@pytest.mark.parametrize(
    ("code", "said"),
    [(errno.ENOSPC, "disk is full"), (errno.EDQUOT, "disk is full"), (errno.EROFS, "read-only")],
)
def test_a_refusal_keeps_the_old_content_and_names_the_file(tmp_path, monkeypatch, code, said):
    path = tmp_path / "report.html"
    write_atomic(path, "old")

    def refuse(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(RunError, match=said) as caught:
        write_atomic(path, "new")
    assert str(path) in str(caught.value)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.html"]


def test_a_kill_between_writing_and_renaming_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    write_atomic(path, "old")
    program = (
        "import os, sys\nfrom experiments.run.files import write_atomic\n"
        "os.replace = lambda *_: os.kill(os.getpid(), 9)\nwrite_atomic(sys.argv[1], 'new')\n"
    )
    assert subprocess.run([sys.executable, "-c", program, str(path)]).returncode == -9
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_json_is_strict_and_comes_back():
    data = {"a": (1, math.nan), "b": {"c": -math.inf, "d": math.inf}, "e": None, "f": True}
    text = to_json(data)
    strict = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict == {"a": [1, "NaN"], "b": {"c": "-Infinity", "d": "Infinity"}, "e": None, "f": True}
    assert number(strict["b"]["c"]) == -math.inf
    assert math.isnan(number(strict["a"][1]))
    assert number("train") == "train"


def test_what_json_cannot_hold_is_named_with_its_path():
    with pytest.raises(TypeError, match=r"model\.layers\[1\]\.act is a builtin_function"):
        jsonable({"model": {"layers": [{}, {"act": abs}]}})
