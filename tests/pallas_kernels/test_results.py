"""Figures are kept until a file of the kernel, or a compiler, is another."""

import json

import pytest

from pallas_kernels import aot, results

PLACE = ("decode_attention", "shape", "v5e")


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "STORE", tmp_path / "results.json")
    return tmp_path / "results.json"


def test_what_was_found_is_read_again(store):
    assert results.read() == {}
    results.kept({}, PLACE, dict(kernels=[], xla=dict(bytes=1)))
    entries = results.read()
    results.kept(entries, ("decode_attention", "another", "v5e"), dict(failed="no"))
    assert list(results.read()) == [("decode_attention", "another", "v5e"), PLACE]
    assert results.read()[PLACE]["found"] == dict(kernels=[], xla=dict(bytes=1))
    assert aot.known(results.read(), PLACE)
    assert not aot.known(results.read(), ("decode_attention", "third", "v5e"))
    changed = json.loads(store.read_text())
    changed[1]["digest"] = "of another kernel"
    store.write_text(json.dumps(changed))
    assert not aot.known(results.read(), PLACE)


def test_a_digest_is_of_a_kernels_files_and_the_compilers(tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tpu.py").write_text("a = 1\n")
    (tmp_path / "one" / "gpu.py").write_text("from pallas_kernels.two.tpu import a\n")
    for name in results.SHARED:
        (tmp_path / name).write_text("")
    monkeypatch.setattr(results, "HERE", tmp_path)
    monkeypatch.setattr(results, "KERNELS", ("one", "two"))
    names = [file.relative_to(tmp_path).as_posix() for file in results.files("one")]
    assert names == ["one/gpu.py", "one/tpu.py", "two/tpu.py", *results.SHARED]

    def digests():
        results.digest.cache_clear()
        return results.digest("one"), results.digest("two")

    before = digests()
    assert digests() == before
    (tmp_path / "one" / "tpu.py").write_text("a = 2\n")
    after = digests()
    assert (after[0] != before[0], after[1] == before[1]) == (True, True)
    (tmp_path / "two" / "tpu.py").write_text("a = 2\n")
    assert digests()[0] != after[0]
    monkeypatch.setattr(results.versions, "compilers", lambda: {"libtpu": "other"})
    assert len({before, after, digests()}) == 3
    results.digest.cache_clear()


def test_every_place_is_compiled_where_there_is_code_for_it(store):
    places = aot.places()
    assert len(set(places)) == len(places)
    assert {kernel for kernel, _, _ in places} == set(aot.KERNELS)
    page = aot._page({})
    assert all(f"- {' '.join(place)}" in page for place in places)


def test_what_is_known_is_not_compiled(store, monkeypatch, capsys):
    wanted = [place for place in aot.places() if place[0] == "decode_attention" and place[2] == "h100"]
    found = dict(kernels=[], xla=dict(temporary=0))
    for place in wanted[1:]:
        results.kept(results.read(), place, found)
    asked = []

    def compiled(place):
        asked.append(place)
        return aot.Row(place[0], place[1], aot.Target("h100", "gpu"), found)

    monkeypatch.setattr(aot, "compiled", compiled)
    monkeypatch.setattr(aot, "RESULTS", store.with_name("RESULTS.md"))
    monkeypatch.setattr("sys.argv", ["aot", "--kernel=decode_attention", "--target=h100", "--write"])
    assert aot.main() == 0
    assert asked == wanted[:1]
    assert all(aot.known(results.read(), place) for place in wanted)
    assert f"{len(wanted) - 1} of {len(wanted)} are known" in capsys.readouterr().out
    assert aot.RESULTS.exists()
