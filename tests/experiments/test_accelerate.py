"""`experiments.accelerate`: on a trained run, on converted weights, and asked wrongly."""

import json

import numpy as np
import pytest

from effjax.errors import UsageError
from effjax.tokens import PiToMe, ToMe
from experiments.run.accelerating import tokens_text
from experiments.run.method_spec import parse
from experiments.run.plots import front_of
from experiments.run.report import Report, Section, Text, render, with_section
from experiments.run.token_pictures import draw_groups, visible
from tests.experiments.driver import drive


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("vit")
    drive("train", "--config=configs/vision/vit.py:smoke", f"--workdir={workdir}")
    return workdir


@pytest.mark.slow
def test_a_run_is_accelerated_by_methods_beside_each_other(trained):
    methods = ("tome:remove=2", "pitome:macs=0.7", "random:keep=0.9,seed=3")
    out, _ = drive("accelerate", f"--workdir={trained}", *(f"--method={m}" for m in methods), "--rounds=2")
    rows = json.loads((trained / "accelerate" / "table.json").read_text())
    assert [row["label"] for row in rows] == ["full model", *methods]
    assert rows[0]["agreement"] == 1.0
    assert rows[0]["speedup"] == 1.0
    assert rows[1]["tokens"] == [16, 14, 12]
    assert 0.5 * rows[0]["macs"] < rows[2]["macs"] <= 0.7 * rows[0]["macs"]
    for row in rows:
        assert row["label"] in out
        assert set(row["metrics"]) == {"loss", "accuracy"}
        assert row["seconds"] > 0
    for name in ("tokens.png", "accuracy_macs.png", "accuracy_seconds.png"):
        assert (trained / "accelerate" / name).read_bytes().startswith(b"\x89PNG")
    page = (trained / "report.html").read_text()
    assert page.count("<h2>Accelerated</h2>") == 1
    assert all(method in page for method in methods)
    drive("accelerate", f"--workdir={trained}", "--method=tome:remove=1", "--method=ats", "--rounds=1")
    whole, _, sampled = json.loads((trained / "accelerate" / "table.json").read_text())
    assert sampled["macs"] < whole["macs"]  # of the tokens that exist, not of those that there is room for
    assert sampled["tokens"][1] < 16
    page = (trained / "report.html").read_text()
    assert page.count("<h2>Accelerated</h2>") == 1
    assert "tome:remove=1" in page
    assert "pitome" not in page


@pytest.mark.slow
def test_a_figure_is_the_same_as_the_evaluation_of_the_run(trained):
    drive("accelerate", f"--workdir={trained}", "--method=tome:keep=1.0", "--rounds=1")
    rows = json.loads((trained / "accelerate" / "table.json").read_text())
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    accuracy = [line["accuracy"] for line in lines if line["split"] == "test"][-1]
    assert rows[0]["metrics"]["accuracy"] == pytest.approx(accuracy)
    assert rows[1]["metrics"]["loss"] == pytest.approx(rows[0]["metrics"]["loss"], rel=1e-5)
    assert rows[1]["agreement"] == 1.0


@pytest.mark.slow
def test_a_diffusion_run_is_accelerated_by_step_caches_and_by_fewer_tokens(tmp_path):
    workdir = tmp_path / "dit"
    drive("train", "--config=configs/diffusion/dit.py:smoke", f"--workdir={workdir}")
    methods = (
        "cg_taylor:threshold=0.0",
        "cg_taylor:threshold=9.0,warmup=2",
        "tome:keep=0.75,metric=features",
    )
    asked = [f"--method={method}" for method in methods]
    more = ["--guidance=2", "--sampler_steps=10", "--rounds=1"]
    out, _ = drive("accelerate", f"--workdir={workdir}", *asked, *more)
    rows = json.loads((workdir / "accelerate" / "table.json").read_text())
    assert [row["label"] for row in rows] == ["full model", *methods]
    assert [row["computed"] for row in rows] == [10, 10, 3, 10]
    assert [row["calls"] for row in rows] == [10] * 4
    assert rows[0]["distance"] == rows[1]["distance"] == 0.0
    assert rows[2]["distance"] > 0
    assert rows[3]["distance"] > 0
    assert "3 of 10" in out
    for name in ("pictures.png", "distance_seconds.png"):
        assert (workdir / "accelerate" / name).read_bytes().startswith(b"\x89PNG")
    assert (workdir / "report.html").read_text().count("<h2>Accelerated</h2>") == 1


@pytest.mark.slow
def test_a_language_run_leaves_neurons_out(tmp_path, trained):
    workdir = tmp_path / "lm"
    drive("train", "--config=configs/language/lm.py:smoke", f"--workdir={workdir}")
    methods = ("cats:sparsity=0.0", "cats:sparsity=0.7,batches=2")
    out, _ = drive("accelerate", f"--workdir={workdir}", *(f"--method={m}" for m in methods), "--rounds=2")
    rows = json.loads((workdir / "accelerate" / "table.json").read_text())
    assert [row["label"] for row in rows] == ["full model", *methods]
    assert all(label in out for label in methods)
    full, every, few = rows
    assert full["metrics"] == every["metrics"] != few["metrics"]
    assert full["agreement"] == every["agreement"] == 1.0 > few["agreement"]
    assert (full["left_out"], every["left_out"]) == (0.0, 0.0)
    assert few["left_out"] == pytest.approx(0.7, abs=0.03)
    ffn = 2 * 3 * 32 * 96  # two layers
    assert full["macs"] - few["macs"] == pytest.approx(2 / 3 * few["left_out"] * ffn)
    assert (workdir / "accelerate" / "perplexity_seconds.png").read_bytes().startswith(b"\x89PNG")
    assert (workdir / "report.html").read_text().count("<h2>Accelerated</h2>") == 1
    for run, method, message in (
        (workdir, "tome:keep=0.9", "none for language models: choose from cats"),
        (trained, "cats:sparsity=0.5", "leaving neurons out is for language models"),
    ):
        _, errors = drive("accelerate", f"--workdir={run}", f"--method={method}", code=2)
        assert message in errors


@pytest.mark.slow
def test_wrong_requests_are_one_line(trained, tmp_path):
    run = f"--workdir={trained}"
    for arguments, message in (
        ((run,), "--method is missing"),
        ((run, "--method=tomme:keep=0.9"), "is 'tomme', which is no kind. Did you mean 'tome'"),
        ((run, "--method=tome:keep=1.5"), "keep=1.5 is no share in (0, 1]"),
        ((run, "--method=tome:kep=0.5"), "kep is read by nobody"),
        ((run, "--method=tome:remove=99"), "remove=99 asks for more tokens than the 16"),
        ((run, "--method=tome:keep=0.9,layers=(5,)"), "layer 5 is not there: the network has 2 layers"),
        ((run, "--method=tome:macs=0.01"), "leaves at least"),
        ((run, "--method=tome:keep=0.9", "--evaluator=tst"), "Did you mean 'test'?"),
        (("--workdir=nowhere", "--method=tome:keep=0.9"), "holds no run"),
        (("--method=tome:keep=0.9",), "--workdir=RUN, or --config=CONFIG with --out"),
        (
            ("--method=tome:keep=0.9", f"--out={tmp_path}", "--config=configs/vision/vit.py:smoke"),
            "weights are",
        ),
    ):
        _, errors = drive("accelerate", *arguments, code=2)
        assert message in errors
        assert len(errors.strip().splitlines()) == 1


def test_a_method_is_read_as_it_is_typed():
    assert parse("pitome:keep=0.925").method == PiToMe(keep=0.925)
    asked = parse("tome:remove=8,inflection=-1.0,layers=(0,2),metric=features")
    assert asked.method == ToMe(remove=8, inflection=-1.0, layers=(0, 2), metric="features")
    assert asked.label.startswith("tome:remove=8")
    assert parse("tome:macs=0.5").macs == 0.5
    for spec in ("tome:keep", "tome:keep=", "tome:keep=f(1)", "tome:**x"):
        with pytest.raises(UsageError, match="method="):
            parse(spec)


def test_patches_are_drawn_in_the_colour_of_their_token():
    image = np.zeros((4, 4, 3), np.uint8)
    image[:, :2] = 200
    groups = np.array([[0, 1], [0, -1]])
    drawn = draw_groups(image, groups, least_pixels=4)
    np.testing.assert_array_equal(drawn[0, 0], 200)
    np.testing.assert_array_equal(drawn[0, 3], 0)
    np.testing.assert_array_equal(drawn[3, 3], (104, 32, 32))
    np.testing.assert_array_equal(drawn[:, 2], 255)  # the line between the tokens


def test_pictures_are_stretched_to_their_own_range():
    shown = visible(np.array([[[[-1.0], [3.0]]]]))
    np.testing.assert_array_equal(shown, [[[[0, 0, 0], [255, 255, 255]]]])


def test_the_front_holds_what_nothing_beats():
    cost = np.array([1.0, 2.0, 2.0, 3.0, 4.0])
    quality = np.array([0.5, 0.6, 0.7, 0.65, 0.7])
    assert front_of(cost, quality) == [0, 2]


def test_runs_of_equal_counts_are_said_once():
    assert tokens_text((17, 17, 17, 12, 9.5)) == "17x3 12 9.5"


def test_a_section_stands_before_how_to_run_it_again_and_replaces_its_namesake():
    page = render(Report("t", {}, [Section("To run it again", [Text("x")])]))
    one = with_section(page, Section("Accelerated", [Text("first")]))
    assert one.index("first") < one.index("To run it again")
    two = with_section(one, Section("Accelerated", [Text("second")]))
    assert "first" not in two
    assert two.replace("second", "first") == one
