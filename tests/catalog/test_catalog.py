"""The catalogue holds what it says, and CATALOG.md says what the catalogue holds."""

import dataclasses
from pathlib import Path

import pytest

from effjax import catalog
from effjax.catalog import table
from effjax.catalog.entry import parse
from effjax.errors import UsageError

ROOT = Path(__file__).parents[2]

FIELDS = {"title": "A", "year": 2020, "family": "hardware", "paper": "B et al.", "files": ["effjax/a.py"]}


def entry(slug="a", room="models", **changes):
    return parse(slug, room, FIELDS | changes)


def test_everything_an_entry_names_exists():
    assert catalog.problems(catalog.load(), ROOT) == []


def test_the_page_is_the_catalogue():
    """After a change: python -m experiments.papers --markdown > CATALOG.md."""
    assert (ROOT / "CATALOG.md").read_text(encoding="utf-8") == catalog.render_markdown(catalog.load())


def test_entries_say_what_they_claim_and_where_they_come_from():
    for each in catalog.load():
        assert each.claim, each.slug
        assert each.paper, each.slug
        assert each.files, each.slug
        assert each.family in catalog.FAMILIES, each.slug


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clam": "faster"}, r"models.toml \[a\]: clam is read by nobody. Did you mean 'claim'\?"),
        ({"year": "2020"}, r"year must be of type int, not '2020'"),
        ({"files": "effjax/a.py"}, "files must be a list of strings, not 'effjax/a.py'"),
        ({"tests": [1]}, "tests must be a list of strings"),
        ({"family": "quantization"}, r"a.family is 'quantization'. Did you mean 'quantisation'\?"),
        ({"status": "work"}, r"a.status is 'work'. Did you mean 'works'\?"),
        ({"status": "works", "tests": ["t.py"]}, "cannot be 'works' without tests and without a measured"),
        ({"status": "works", "measured": "2x"}, "cannot be 'works'"),
    ],
)
def test_a_wrong_entry_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        entry(**changes)


@pytest.mark.parametrize("field", ["paper", "family"])
def test_a_missing_field_is_named(field):
    with pytest.raises(UsageError, match=rf"models.toml \[a\]: {field} is missing"):
        parse("a", "models", {key: value for key, value in FIELDS.items() if key != field})


def test_an_entry_with_a_measured_result_and_a_test_works():
    assert entry(status="works", measured="2.1x on 8 cores", tests=["t.py"]).status == "works"


def test_line_breaks_in_the_file_mean_nothing():
    assert entry(claim="\none\ntwo").claim == "one two"


def test_problems_name_what_is_missing(tmp_path):
    (tmp_path / "config.py").write_text("")
    (tmp_path / "test_a.py").write_text("def test_it():\n    pass\n")
    kept = {"files": ["config.py"], "configs": ["config.py:tiny"], "tests": ["test_a.py::test_it"]}
    assert catalog.problems([entry(**kept)], tmp_path) == []
    lost = {"files": ["gone.py"], "configs": ["lost.py:tiny"], "tests": ["test_a.py::test_other"]}
    assert catalog.problems([entry(**lost)], tmp_path) == [
        "models/a: files names gone.py, but there is no file gone.py.",
        "models/a: configs names lost.py:tiny, but there is no file lost.py.",
        "models/a: tests names test_a.py::test_other, but test_a.py has no test test_other.",
    ]
    assert catalog.problems([entry(status="planned", **lost)], tmp_path) == []


ENTRIES = (
    entry("one", claim="Twice as FAST."),
    entry("two", room="train", paper="Fastidious et al.", family="training"),
    entry("three", room="train", status="planned"),
)


@pytest.mark.parametrize(
    ("filters", "slugs"),
    [
        ({}, ["one", "two", "three"]),
        ({"room": "train"}, ["two", "three"]),
        ({"status": "planned"}, ["three"]),
        ({"word": "fast"}, ["one", "two"]),
        ({"word": "fast", "room": "train"}, ["two"]),
        ({"word": "nowhere"}, []),
        ({"family": "training"}, ["two"]),
    ],
)
def test_find(filters, slugs):
    assert [e.slug for e in catalog.find(ENTRIES, **filters)] == slugs


def test_unknown_names_are_usage_errors():
    with pytest.raises(UsageError, match=r"'onee' is not in the catalogue. Did you mean 'one'\?"):
        catalog.get("onee", ENTRIES)
    with pytest.raises(UsageError, match=r"No room 'trains'.* Did you mean 'train'\?"):
        catalog.find(ENTRIES, room="trains")
    with pytest.raises(UsageError, match=r"No status 'done'. Known: 'planned', 'unmeasured', 'works'"):
        catalog.find(ENTRIES, status="done")
    with pytest.raises(UsageError, match=r"No family 'prunning'. Did you mean 'pruning'"):
        catalog.find(ENTRIES, family="prunning")


def write_rooms(monkeypatch, folder, **files):
    (folder / "rooms").mkdir()
    for name, text in files.items():
        (folder / "rooms" / f"{name}.toml").write_text(text)
    monkeypatch.setattr(table.importlib.resources, "files", lambda package: folder)


MINIMAL = '[{}]\ntitle = "A"\nyear = 2020\nfamily = "pruning"\npaper = "B"\nfiles = ["a.py"]\n'


def test_rooms_are_read_in_order(monkeypatch, tmp_path):
    write_rooms(monkeypatch, tmp_path, train=MINIMAL.format("x"), models=MINIMAL.format("y"))
    assert [(e.slug, e.room) for e in catalog.load()] == [("y", "models"), ("x", "train")]


def test_a_slug_stands_once(monkeypatch, tmp_path):
    write_rooms(monkeypatch, tmp_path, train=MINIMAL.format("x"), models=MINIMAL.format("x"))
    with pytest.raises(UsageError, match="x stands twice: in models and in train"):
        catalog.load()


def test_a_broken_file_is_named(monkeypatch, tmp_path):
    write_rooms(monkeypatch, tmp_path, train="[x")
    with pytest.raises(UsageError, match=r"train.toml is not TOML: .*table declaration"):
        catalog.load()


def test_the_page_holds_every_field():
    full = entry(configs=["c.py:tiny"], tests=["t.py"], claim="A claim.", differences="A difference.")
    page = catalog.render_markdown([full, dataclasses.replace(full, slug="b", measured="2.1x.")])
    for text in (
        "| [a](#a) | models | hardware | 2020 | unmeasured |",
        "### a",
        "`effjax/a.py`",
        "`c.py:tiny`",
        "`t.py`",
    ):
        assert text in page
    for text in ("A claim.", "A difference.", "- Measured: *not measured yet*", "- Measured: 2.1x."):
        assert text in page
    assert page.count("## models") == 1
