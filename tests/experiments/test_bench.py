"""Benchmarks of models: what is timed, what is written, and how it answers a wrong request."""

import itertools
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from effjax.errors import RunError, UsageError
from effjax.experiment import resolve
from experiments.run import bench_models, bench_report, config_file
from experiments.run.bench_models import Pair, Result, Side, bench, worker
from experiments.run.bench_sides import effjax_steps, inputs
from experiments.run.bench_worker import peak_bytes
from experiments.run.timm_names import NAMES
from tests.experiments.driver import ROOT, drive

# Whole networks: the whole suite has time for them.
pytestmark = pytest.mark.slow

TOYS = ("configs/vision/vit.py:smoke", "configs/vision/swin.py:smoke")


def side(*seconds, peak=10**9):
    return Side(seconds, tuple(2 * one for one in seconds), peak)


def result(config="configs/vision/vit.py:s16", top1=None, timm=None):
    pair = Pair(side(2.0, 4.0), timm)
    return Result(config, "a_model", 8, (224, 224), 22_050_664, 4_608_338_304, top1, {"forward": pair})


def test_the_driver_times_every_config_and_writes_table_json_and_plot(tmp_path):
    output, _ = drive(
        "bench",
        "models",
        f"--config={','.join(TOYS)}",
        "--batch=2",
        "--rounds=3",
        "--steps=2",
        f"--out={tmp_path}",
        "--config.model.drop_path=0.5",
    )
    said = json.loads((tmp_path / "bench.json").read_text())
    assert [one["config"] for one in said["results"]] == list(TOYS)
    assert said["environment"]["packages"]["jax"] == jax.__version__
    for one in said["results"]:
        assert one["batch"] == 2
        assert one["size"] == [8, 8]
        forward, train = one["steps"]["forward"]["ours"], one["steps"]["train"]["ours"]
        assert len(forward["seconds"]) == len(train["cpu"]) == 3
        assert min(train["seconds"]) > min(forward["seconds"]) > 0
        assert train["peak"] >= forward["peak"] > 50e6
        assert one["config"] in output
    assert said["results"][0]["parameters"] == 7098
    table = (tmp_path / "bench.md").read_text().splitlines()
    assert [line.split(" | ")[4] for line in table[2:6]] == ["forward", "train"] * 2
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_the_training_step_is_that_of_the_mean_cross_entropy():
    """Against the loss in numpy; the head's bias has the gradient softmax - target, averaged."""
    loaded = SimpleNamespace(config=_config(TOYS[0]))
    model = resolve(loaded.config).task.model
    images, labels = inputs(4, (8, 8, 1), 10)
    steps = effjax_steps(model, images, labels)
    (loss, _), gradient = steps["train"]()
    logits = np.float64(steps["forward"]())
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    expected = -np.mean(np.log(powers / powers.sum(-1, keepdims=True))[np.arange(4), labels])
    assert loss == pytest.approx(expected, rel=1e-5)
    target = np.eye(10)[labels]
    bias = np.mean(powers / powers.sum(-1, keepdims=True) - target, 0)
    np.testing.assert_allclose(gradient["head"]["bias"], bias, rtol=1e-4, atol=1e-6)


def test_batch_statistics_belong_to_a_training_step():
    config = _config("configs/vision/swin.py:smoke")
    for stage in config.model.stages:
        for block in stage["blocks"]:
            block["norm"] = "batch"
    images, labels = inputs(2, (8, 8, 1), 10)
    (_, changed), _ = effjax_steps(resolve(config).task.model, images, labels)["train"]()
    assert set(changed) == {"batch_stats"}


def test_both_sides_take_turns(monkeypatch):
    asked = []

    class Counting:
        def __init__(self, name):
            self.name = name

        def ask(self, step):
            asked.append((self.name, step))
            return {"seconds": 2.0 if self.name == "ours" else 3.0, "cpu": 1.0, "peak": len(asked)}

    pair = bench_models._time({name: Counting(name) for name in ("ours", "timm")}, "train", 2, 3)
    counted = [name for name, _ in asked][4:]
    assert counted == ["ours", "ours", "timm", "timm"] * 3
    assert pair.ratio == pytest.approx(1.5)
    assert pair.ours.peak < pair.timm.peak == len(asked)


def test_ratios_are_of_least_times_and_the_spread_is_of_neighbours():
    pair = Pair(side(1.0, 2.0, 4.0), side(3.0, 2.0, 2.0))
    assert pair.ratio == 2.0
    assert pair.cpu_ratio == 2.0
    assert pair.spread == pytest.approx(tuple(np.quantile([3.0, 1.0, 0.5], (0.25, 0.75))))
    alone = Pair(side(1.0))
    assert alone.ratio is alone.spread is alone.cpu_ratio is None


def test_a_row_says_what_was_measured():
    row = dict(
        zip(
            bench_report.HEADINGS, bench_report.rows([result(top1=79.8, timm=side(3.0, 3.0))])[0], strict=True
        )
    )
    assert row["images/s"] == "4"
    assert row["timm images/s"] == "2.667"
    assert row["ratio"] == "1.50"
    assert row["top-1"] == "79.8%"
    assert row["parameters"] == "22.05M"
    assert row["peak"] == "1.00GB"
    alone = dict(zip(bench_report.HEADINGS, bench_report.rows([result()])[0], strict=True))
    assert alone["timm images/s"] == alone["ratio"] == alone["top-1"] == "-"


@pytest.fixture
def drawn(monkeypatch):
    kept = []
    monkeypatch.setattr(bench_report, "png", lambda figure: kept.append(figure) or b"")
    return kept


def test_the_plot_shows_accuracy_over_macs_and_over_latency(drawn):
    bench_report.plot([result(top1=79.8, timm=side(4.0)), result("configs/vision/swin.py:tiny", top1=81.3)])
    left, right = drawn[0].axes
    assert [tuple(line.get_xydata()[0]) for line in left.lines] == [(4.608338304, 79.8), (4.608338304, 81.3)]
    assert [tuple(line.get_xydata()[0]) for line in right.lines] == [(250, 79.8), (500, 79.8), (250, 81.3)]
    assert right.lines[1].get_markerfacecolor() == "white"
    assert [text.get_text() for text in right.texts] == ["vit:s16", "swin:tiny"]


def test_without_a_published_accuracy_the_plot_shows_latency_over_macs(drawn):
    bench_report.plot([result()])
    (axes,) = drawn[0].axes
    assert tuple(axes.lines[0].get_xydata()[0]) == (4.608338304, 250)


def test_a_side_that_fails_says_why():
    with pytest.raises(RunError, match=r"a side of the benchmark ended: .*KeyError: 'shape'"), worker({}):
        pass


def test_only_classifiers_and_sensible_numbers_are_taken():
    loaded = SimpleNamespace(config=_config("configs/language/lm.py:smoke"), name="lm")
    with pytest.raises(UsageError, match="lm is no classifier of pictures"):
        bench(loaded, 1, None, 1, 1)
    _, errors = drive("bench", "models", f"--config={TOYS[0]}", "--batch=0", code=2)
    assert "--batch=0 must be at least 1" in errors
    _, errors = drive(
        "bench", "models", "--config=configs/vision/vit.py:smoke,configs/vision/vit.py:smke", code=2
    )
    assert "has no variant 'smke'" in errors
    _, errors = drive("bench", "model", f"--config={TOYS[0]}", code=2)
    assert "Did you mean 'models'" in errors


def test_overrides_go_to_every_config(monkeypatch):
    flags = config_file.flags.FlagValues()
    config_file.define_configs(TOYS[0], flag_values=flags)
    arguments = ["bench", f"--config={','.join(TOYS)}", "--config.model.drop_path=0.25"]
    monkeypatch.setattr("sys.argv", arguments)
    flags(arguments)
    first, second = config_file.load_configs(flags)
    assert first.config.model.drop_path == second.config.model.drop_path == 0.25
    assert (first.name, second.name) == TOYS
    assert dict(first.overrides) == {"model.drop_path": 0.25}


def test_every_model_with_a_name_in_timm_exists():
    files = {name.partition(":")[0] for name in NAMES}
    variants = {file: vars(_module(file))["VARIANTS"] for file in files}
    assert all(variant in variants[file] for file, _, variant in (name.partition(":") for name in NAMES))
    assert len(set(NAMES.values())) == len(NAMES)


def test_the_peak_of_memory_is_that_of_this_process():
    before = peak_bytes()
    held = np.ones(200 * 2**20 // 8)
    assert peak_bytes() >= max(before, held.nbytes)
    del held
    assert all(now >= earlier for earlier, now in itertools.pairwise([before, peak_bytes()]))


def _module(path):
    import importlib

    assert (ROOT / path).is_file()
    return importlib.import_module(path.removesuffix(".py").replace("/", "."))


def _config(name):
    path, _, variant = name.partition(":")
    return _module(path).get_config(variant)
