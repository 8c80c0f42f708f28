"""Every driver on compressed runs: a classifier, a denoiser and a language model, each of a few steps."""

import json
import signal
import urllib.request

import jax
import numpy as np
import pytest

from effjax.compress.storage.trees import held_bytes, stored_in, weights_in
from experiments.run.restore import load_run
from tests.experiments.driver import drive, metric_rows, start

CONFIGS = {
    "vision": "configs/vision/vit.py:smoke",
    "diffusion": "configs/diffusion/dit.py:smoke",
    "language": "configs/language/lm.py:smoke",
}
RECIPE = ("--recipe=configs/compress/round.py:int4", "--recipe.steps[0].layout.group=8", "--rounds=1")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """The folder of a compressed run of a family, made at its first use."""
    made = {}

    def folder(family):
        if family not in made:
            runs = tmp_path_factory.mktemp(family)
            drive("train", f"--config={CONFIGS[family]}", f"--workdir={runs / 'run'}")
            drive("compress", f"--workdir={runs / 'run'}", *RECIPE, f"--out={runs / 'small'}")
            made[family] = runs / "small"
        return made[family]

    return folder


@pytest.mark.parametrize(
    ("family", "method", "more"),
    [
        ("vision", "tome:remove=2", ()),
        ("diffusion", "cg_taylor:threshold=0.1", ("--sampler_steps=3",)),
        ("language", "window:budget=16", ("--examples=4",)),
    ],
)
def test_it_is_accelerated(compressed, tmp_path, family, method, more):
    run = compressed(family)
    flags = (f"--method={method}", "--rounds=1", f"--out={tmp_path}", *more)
    out, _ = drive("accelerate", f"--workdir={run}", *flags)
    assert "full model" in out
    assert method in out


@pytest.mark.parametrize(
    ("family", "step", "more"),
    [
        ("vision", "evaluate", ()),
        ("diffusion", "sample", ("--batch=2", "--sampler_steps=3")),
        ("language", "decode", ("--batch=2", "--context=32")),
    ],
)
def test_it_is_planned_in_the_bytes_that_it_is_stored_in(compressed, tmp_path, family, step, more):
    run = compressed(family)
    out = tmp_path / "plan"
    drive("plan", f"--workdir={run}", "--topology=cpu:2", f"--step={step}", f"--out={out}", *more)
    found = json.loads(out.read_text())
    params = load_run(run)[1]["params"]
    assert found["fits"]
    assert found["weight_bytes"] == held_bytes(params)
    assert found["parameters"] == weights_in(params) < found["weight_bytes"] < 4 * found["parameters"]
    assert "products with packed weights" in " ".join(found["notes"])


def test_it_is_evaluated_and_sampled(compressed, tmp_path):
    out, _ = drive("evaluate", f"--workdir={compressed('vision')}")
    (said,) = map(json.loads, (compressed("vision") / "metrics.jsonl").read_text().splitlines())
    assert f"{said['accuracy']:.4g}" in out
    picture = tmp_path / "pictures.png"
    drive("sample", f"--workdir={compressed('diffusion')}", f"--out={picture}", "--steps=2", "--per_class=1")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_it_is_served_as_it_writes(compressed):
    run = compressed("language")
    text, _ = drive("generate", f"--workdir={run}", "--prompt=Return the ", "--max_new=6", "--temperature=0")
    server = start("serve", f"--workdir={run}", "--port=0", "--rows=1")
    try:
        lines = iter(server.stdout.readline, "")
        address = next(line.split(" at ")[1].strip() for line in lines if line.startswith("serving"))
        body = json.dumps(dict(prompt="Return the ", max_tokens=6, temperature=0)).encode()
        asked = urllib.request.Request(
            f"{address}/v1/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(asked, timeout=60) as answer:
            written = json.load(answer)["choices"][0]["text"]
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=60)
    assert text.rstrip("\n") == f"Return the {written}"


def test_packed_layers_go_out_come_in_and_are_measured(compressed, tmp_path):
    run = compressed("language")
    _, error = drive(
        "convert", "--to=transformers:llama", f"--workdir={run}", f"--out={tmp_path / 'a'}", code=2
    )
    assert "--quantised=gptq" in error
    assert not (tmp_path / "a").exists()
    out = f"--out={tmp_path / 'awq'}"
    said, _ = drive("convert", "--to=transformers:llama", f"--workdir={run}", "--quantised=awq", out)
    assert "config.json" in said
    _, variables = load_run(run)
    assert f"{weights_in(variables['params']) / 1e3:.2f}k parameters" in said
    ours = tmp_path / "ours"
    drive("convert", "--from=transformers:llama", f"--weights={tmp_path / 'awq'}", f"--out={ours}")
    again = tmp_path / "again"
    drive("convert", "--to=transformers:llama", f"--weights={ours}", "--quantised=awq", f"--out={again}")
    weights = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path / "awq", again)]
    told = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "awq", again)]
    assert weights[0] == weights[1]
    assert told[0] == told[1]
    # Weights that came in are measured as the run is that they came from.
    config = (f"--config={CONFIGS['language']}", f"--config.train.start={ours}")
    flags = ("--method=window:budget=16", "--rounds=1", "--examples=4")
    tables = [
        drive("accelerate", *given, *flags, f"--out={tmp_path / 'table'}")[0]
        for given in (config, (f"--workdir={run}",))
    ]
    first, second = (
        [line.split()[2:5] for line in table.splitlines() if line.startswith("full model")]
        for table in tables
    )
    assert first == second


def test_codes_do_not_train(compressed, tmp_path):
    run = compressed("vision")
    config = f"--config={CONFIGS['vision']}"
    workdir = tmp_path / "tuned"
    _, error = drive("train", config, f"--config.train.start={run}", f"--workdir={workdir}", code=2)
    assert "are stored as codes, which do not train" in error
    assert not workdir.exists()
    out = f"--out={tmp_path / 'compared'}"
    _, error = drive("compare", config, f"--config.train.start={run}", out, code=1)
    assert "are stored as codes, which do not train" in error
    _, error = drive("plan", f"--workdir={run}", "--topology=cpu:2", f"--out={tmp_path / 'plan'}", code=2)
    assert "do not train" in error


def test_a_restored_run_is_what_was_compressed(compressed):
    _, held = load_run(compressed("diffusion"))
    stored = stored_in(held["params"])
    assert {path.split("/")[0] for path in stored} == {"blocks"}
    for leaf in stored.values():
        assert {plane.dtype for plane in leaf.codes} == {np.dtype(np.uint8)}
    assert all(np.isfinite(np.asarray(leaf.whole(np.float32))).all() for leaf in stored.values())
    assert jax.tree.structure(load_run(compressed("diffusion"))[1]) == jax.tree.structure(held)


def test_a_pruned_run_is_a_run_as_any_other(compressed, tmp_path):
    run = compressed("language").parent / "run"
    half = tmp_path / "half"
    drive(
        *("compress", f"--workdir={run}", "--recipe=configs/compress/prune.py:random-once", "--rounds=1"),
        *("--recipe.steps[0].least.hidden=3", "--recipe.steps[0].least.hidden_step=1", f"--out={half}"),
    )
    program, variables = load_run(half)
    _, whole = load_run(run)
    assert weights_in(variables["params"]) < weights_in(whole["params"])
    assert program.task.model.layer_blocks
    drive("evaluate", f"--workdir={half}")
    drive("generate", f"--workdir={half}", "--prompt=Return the ", "--max_new=4")
    out = tmp_path / "plan"
    drive("plan", f"--workdir={half}", "--topology=cpu:2", f"--out={out}")
    assert json.loads(out.read_text())["parameters"] == weights_in(variables["params"])
    tuned = tmp_path / "tuned"
    config = f"--config={CONFIGS['language']}"
    drive(
        "train", config, f"--config.train.start={half}", "--config.train.steps=2 steps", f"--workdir={tuned}"
    )
    assert load_run(tuned)[0].task.model == program.task.model
    small = tmp_path / "small"
    drive("compress", f"--workdir={tuned}", RECIPE[0], "--recipe.steps[0].layout.group=1", f"--out={small}")
    assert stored_in(load_run(small)[1]["params"])


def test_two_runs_are_stitched(compressed, tmp_path):
    run = compressed("vision").parent / "run"
    both = tmp_path / "both"
    recipe = ("--recipe=configs/compress/stitch.py:early", f"--recipe.steps[0].small={run}")
    drive("compress", f"--workdir={run}", *recipe, "--recipe.steps[1].how.steps=2", f"--out={both}")
    program, variables = load_run(both)
    whole = load_run(run)[0].task.model
    assert [block.width for block in program.task.model.layer_blocks] == [whole.dim, None]
    assert weights_in(variables["params"]) > weights_in(load_run(run)[1]["params"])


def test_a_family_is_trained_and_a_member_taken_out(compressed, tmp_path):
    large, small = compressed("vision").parent / "run", tmp_path / "small"
    config = "--config=configs/vision/vit.py:smoke"
    drive("train", config, f"--workdir={small}", "--config.model.dim=8", "--config.train.steps=2 steps")
    folders = (f"--config.task.weights={large}", f"--config.task.small_weights={small}")
    family = tmp_path / "family"
    drive("train", "--config=configs/vision/stitchable.py:smoke", f"--workdir={family}", *folders)
    assert {"accuracy_1_1", "accuracy_2_end"} <= {name for row in metric_rows(family) for name in row}
    for variant, width in (("early", 8), ("large", 16)):
        out = tmp_path / variant
        recipe = f"--recipe=configs/compress/member.py:{variant}"
        said, _ = drive("compress", f"--workdir={family}", recipe, f"--out={out}", "--rounds=1")
        assert "path" in said
        program, _ = load_run(out)
        assert (program.task.model.dim, type(program.task).__name__) == (width, "Classification")
    drive("train", "--config=configs/vision/vit.py:smoke", f"--config.train.start={tmp_path / 'early'}",
          f"--workdir={tmp_path / 'on'}", "--config.train.steps=2 steps")  # fmt: skip
