import base64
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from effjax.errors import RunError
from experiments.run import run_report
from experiments.run.metrics import MetricsWriter
from experiments.run.plots import image_grid
from experiments.run.report import Code, Figure, Report, Section, Table, Text, render
from experiments.run.workdir import Workdir

VOID = {"meta", "img"}
EVIL = "<script>alert(\"x\")</script> & 'y'"
PNG = image_grid(np.zeros((1, 4, 4, 3), np.uint8), 1)


class Checker(HTMLParser):
    """Collects what a page says, and fails where a tag is not closed."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def attributes(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def everything(text):
    parts = [
        Text(text),
        Table((text, "n"), [(text, 1), ("inner", 1_234_567)], depths=(0, 1)),
        Figure(PNG, text, text, plot=True),
        Figure(PNG, text, pixelated=True),
        Code(text),
    ]
    return Report(
        text, {text: text}, [Section(text, parts), Section(text, parts, folded=True)], subtitle=text
    )


def test_everything_given_is_escaped():
    page = render(everything(EVIL))
    checked = Checker(page)
    assert "script" not in {tag for tag, _ in checked.tags}
    assert {image["alt"] for image in checked.attributes("img")} == {EVIL}
    # Title, heading, subtitle, summary (2), and per section: heading, text, table (2), caption, code.
    assert checked.text.count(EVIL) == 5 + 2 * 6


def test_a_page_stands_alone():
    page = render(everything("plain"))
    assert not re.search(r"https?:|//\w|<script|<link|@import|url\(", page)
    sources = [image["src"] for image in Checker(page).attributes("img")]
    assert len(sources) == 4
    assert base64.b64decode(sources[0].removeprefix("data:image/png;base64,")) == PNG


def test_a_page_fits_phones_and_both_colour_schemes():
    page = render(everything("plain"))
    metas = Checker(page).attributes("meta")
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in metas
    assert "prefers-color-scheme: dark" in page
    assert page.startswith("<!doctype html>\n<html lang=")


def test_tables_align_numbers_and_indent_the_tree():
    table = Table(("name", "n", "mixed"), [("a", 1234, 1), ("b", None, "two")], depths=(0, 2))
    checked = Checker(render(Report("t", {}, [Section("s", [table])])))
    classes = [cell.get("class") for cell in checked.attributes("td")]
    assert classes == ["n", None, "n", None]
    assert "1,234" in checked.text
    indents = [cell.get("style") for cell in checked.attributes("th") if cell["scope"] == "row"]
    assert indents[0] is None
    assert "padding-left:2.8em" in indents[1]


def test_neighbouring_figures_share_a_row():
    figure = Figure(PNG, "a")
    page = render(Report("t", {}, [Section("s", [figure, figure, Text("between"), figure])]))
    assert page.count("<div class=figures>") == 2


@pytest.fixture
def run_folder(tmp_path):
    config = {"seed": 3, "model": {"stages": [{"depth": 2}, {"depth": 4}], "names": ["a", "b"]}, "empty": {}}
    with Workdir.create_or_resume(
        tmp_path, config, command="python -m experiments.train --config=c.py:smoke", config_file="c.py:smoke",
        devices=["chip 0", "chip 1"],
    ):  # fmt: skip
        pass
    return tmp_path


def test_the_report_of_a_run_says_all_that_the_folder_knows(run_folder):
    with MetricsWriter(run_folder) as writer:
        for step in range(1, 4):
            writer.write(step, "train", {"loss": 1 / step})
        writer.write(3, "test", {"loss": 0.5, "top1/accuracy": 0.75})
    curves = run_report.curves_of(run_folder)
    report = run_report.of_run(
        run_folder,
        title="ViT on digits",
        curves=curves,
        summary={"accuracy": "0.75", "parameters": "5.72M"},
        baselines={"logistic regression": {"accuracy": "0.95"}},
        cost_columns=("parameters", "MACs"),
        cost=[run_report.CostRow("vit", 0, (100, 200)), run_report.CostRow("head", 1, (10, 20))],
        samples=[Figure(PNG, "four digits")],
        notes=["3 records were skipped."],
    )
    path = run_report.write_report(run_folder, report)
    assert path == run_folder / "report.html"
    checked = Checker(path.read_text())
    titles = [section.title for section in report.sections]
    assert titles == [
        "Notes", "Compared with", "Curves", "Samples", "Cost", "To run it again", "Config", "Environment"
    ]  # fmt: skip
    for said in (
        "python -m experiments.train --config=c.py:smoke", "config.model.stages[1].depth", "chip 0, chip 1",
        "3 records were skipped.", "logistic regression", '["a", "b"]', "config.empty", "head",
    ):  # fmt: skip
        assert said in checked.text
    alts = [image["alt"] for image in checked.attributes("img")]
    assert alts == [
        "Curve of loss over steps: train ends at 0.3333, test ends at 0.5.",
        "Curve of top1/accuracy over steps: test ends at 0.75.",
        "four digits",
    ]
    names = [file.relative_to(run_folder).as_posix() for file in run_report.write_plots(run_folder, curves)]
    assert names == ["plots/loss.png", "plots/top1_accuracy.png"]
    assert all((run_folder / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_a_run_that_measured_nothing_has_a_report(run_folder):
    report = run_report.of_run(run_folder, title="t", summary={}, curves=run_report.curves_of(run_folder))
    assert [section.title for section in report.sections] == ["To run it again", "Config", "Environment"]
    Checker(render(report))


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(RunError, match=r"config\.json"):
        run_report.of_run(tmp_path, title="t", summary={}, curves={})
