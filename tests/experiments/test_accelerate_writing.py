"""`experiments.accelerate` with methods that change how a language model writes."""

import json

import numpy as np
import pytest

from effjax.decoding.policies.heavy_hitters import HeavyHitters
from effjax.errors import UsageError
from experiments.run.accelerated_writing import prompt_of
from experiments.run.method_spec import parse
from tests.experiments.driver import drive


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("lm")
    drive("train", "--config=configs/language/lm.py:smoke", f"--workdir={workdir}")
    return workdir


@pytest.mark.slow
def test_policies_stand_beside_each_other(trained):
    methods = ("all", "window:budget=16,sinks=2", "heavy_hitters:budget=64")
    methods += ("gemfilter:layer=1,keep=8,recent=2", "gemfilter:layer=0,keep=32", "early_exit:blocks=1")
    methods += ("unified_softmax:splits=3",)
    asked = [f"--method={method}" for method in methods]
    out, _ = drive("accelerate", f"--workdir={trained}", *asked, "--rounds=1", "--examples=8")
    full, kept, window, whole, gems, read, exit_, parts = json.loads(
        (trained / "accelerate" / "writing.json").read_text()
    )
    assert [full["label"], kept["label"], window["label"]] == ["full model", *methods[:2]]
    assert "prompts of 32 tokens" in out
    # What keeps everything says the same, to the last bit.
    for row in (kept, whole, read):
        assert row["perplexity"] == full["perplexity"]
        assert row["agreement"] == 1.0
    assert window["perplexity"] != full["perplexity"]
    assert window["keys"] == 16
    assert full["keys"] == 64
    # Two layers, two heads of eight channels, float32, and the positions.
    assert full["cache_bytes"] == pytest.approx(2 * 64 * (2 * 2 * 8 * 4 + 4), abs=8)
    assert window["cache_bytes"] == pytest.approx(full["cache_bytes"] / 4, abs=8)
    assert window["macs"] < full["macs"]
    # 8 of the 32 tokens of the prompts, and what follows them.
    assert gems["keys"] == 40
    assert gems["cache_bytes"] == pytest.approx(full["cache_bytes"] * 40 / 64, abs=8)
    assert gems["perplexity"] != full["perplexity"]
    assert exit_["cache_bytes"] == pytest.approx(full["cache_bytes"] / 2, abs=8)
    assert exit_["macs"] < 0.75 * full["macs"]
    assert parts["perplexity"] == pytest.approx(full["perplexity"], rel=1e-5)
    assert (parts["cache_bytes"], parts["keys"]) == (full["cache_bytes"], full["keys"])
    assert (trained / "accelerate" / "quality_bytes.png").read_bytes().startswith(b"\x89PNG")
    assert (trained / "report.html").read_text().count("<h2>Writing</h2>") == 1


@pytest.mark.slow
def test_what_can_not_be_is_refused(trained):
    def refused(*flags):
        return drive("accelerate", f"--workdir={trained}", *flags, code=2)[1]

    assert "ask for others by themselves" in refused("--method=all", "--method=cats:sparsity=0.5")
    assert "layer=2 of 2" in refused("--method=gemfilter:layer=2,keep=4")
    assert "layer 5 is not there" in refused("--method=skip_layers:layers=(5,)")
    assert "budget=4 slots hold no window beside sinks=4" in refused("--method=window:budget=4")


def test_prompts_reach_to_the_first_answer():
    weights = np.zeros((2, 12))
    weights[0, 7], weights[1, 5:9] = 1, 1
    batch = dict(tokens=np.zeros((2, 12)), weights=weights, mask=np.ones(2))
    assert prompt_of([batch]) == 6  # the token at place 5 is read for the first answer
    assert prompt_of([batch | dict(mask=np.array([1, 0]))]) == 8
    assert prompt_of([batch | dict(weights=np.ones((2, 12)))]) == 6


def test_a_kind_within_a_kind_is_read():
    asked = parse("heavy_hitters:budget=9,storage=plain()")
    assert asked.method == HeavyHitters(budget=9)
    with pytest.raises(UsageError, match="plane"):
        parse("heavy_hitters:budget=9,storage=plane()")
