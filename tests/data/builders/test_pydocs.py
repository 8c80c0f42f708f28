import hashlib
import json
import os
import subprocess
import sys
import textwrap

import pytest

from effjax.data.builders import pydocs
from effjax.data.sources import Tfds

DIGEST = """
    import hashlib, json
    from effjax.data.builders import pydocs
    print(hashlib.sha256(json.dumps(pydocs.documents()).encode()).hexdigest())
"""


@pytest.fixture(scope="module")
def found():
    return pydocs.documents()


@pytest.mark.slow
def test_the_same_in_another_process(found):
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", textwrap.dedent(DIGEST)]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert out.stdout.strip() == hashlib.sha256(json.dumps(found).encode()).hexdigest()


def test_documents(found):
    assert len(found) > 3000
    assert len(set(found.values())) == len(found)
    assert list(found) == sorted(found)
    assert "immutable sequence" in found["topics.typesseq"].lower()
    assert "json.dumps" in found or "json.dump" in found
    assert not any(name.startswith(("test.", "idlelib.")) for name in found)


def test_splits_are_disjoint_and_read_back(found, tmp_path, monkeypatch):
    some = dict(list(found.items())[:400])
    monkeypatch.setattr(pydocs, "documents", lambda: some)
    sides = {}
    for split in ("train", "test"):
        reader = Tfds("pydocs", split=split, data_dir=str(tmp_path)).open()
        sides[split] = {reader[i]["name"].decode(): reader[i]["text"].decode() for i in range(len(reader))}
    assert sides["train"] | sides["test"] == some
    assert not set(sides["train"].values()) & set(sides["test"].values())
    assert 5 <= len(sides["test"]) <= 40


def test_the_side_hangs_on_the_text_alone(found):
    share = sum(map(pydocs.in_test, found.values())) / len(found)
    assert 0.04 < share < 0.06
    assert [n for n in range(100) if pydocs.in_test(f"document {n}")] == [40, 70]


def test_duplicates_keep_the_first_name(tmp_path, monkeypatch):
    text = '"""' + "What two modules say in the same words, at sufficient length to count. " * 2 + '"""'
    (tmp_path / "b.py").write_text(text)
    (tmp_path / "a.py").write_text(f"def inner():\n    {text}\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "c.py").write_text(text.replace("two", "three"))
    monkeypatch.setattr(pydocs.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert list(pydocs.documents()) == ["a.inner"]
