"""The convert driver, in a process of its own where that matters."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from effjax.errors import UsageError
from effjax.interop import load_pretrained
from experiments.run import converting
from tests.experiments.driver import drive
from tests.interop.toys import CONFIG, SOURCE, weights


@pytest.fixture
def file(tmp_path):
    save_file(weights(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def inwards(file, out, config=None, **options):
    given = dict(classes="keep", dtype=None, allow_nan=False, shard_bytes=10**9) | options
    return converting.inwards(SOURCE, str(file), str(out), library_config=config, **given)


@pytest.mark.slow
def test_there_and_back_through_the_driver(tmp_path, file):
    config = json.dumps(CONFIG)
    out, _ = drive(
        "convert",
        f"--from={SOURCE}",
        f"--weights={file}",
        f"--library_config={config}",
        f"--out={tmp_path}/ours",
    )
    assert "6.25k parameters" in out
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["library_config"] == CONFIG
    out, _ = drive("convert", f"--to={SOURCE}", f"--weights={tmp_path}/ours", f"--out={tmp_path}/back")
    assert "model.safetensors" in out
    back = load_file(tmp_path / "back" / "model.safetensors")
    tensors = weights()
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[name], tensors[name]) for name in tensors)


def test_the_weights_of_a_run_go_out(tmp_path, monkeypatch, capsys):
    tensors = weights()
    model, params = load_pretrained(SOURCE, tensors, CONFIG)
    asked = []

    def load_run(workdir, step):
        asked.append((workdir, step))
        return SimpleNamespace(task=SimpleNamespace(model=model)), {"params": jax.device_put(params)}

    monkeypatch.setattr(converting, "load_run", load_run)
    converting.outwards_from_run(SOURCE, "runs/x", str(tmp_path / "out"), 10**9, 7)
    back = load_file(tmp_path / "out" / "model.safetensors")
    assert asked == [("runs/x", 7)]
    assert all(np.array_equal(back[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give one of --from"),
        ([f"--from={SOURCE}", f"--to={SOURCE}"], "give one of --from"),
        ([f"--from={SOURCE}"], "--weights is missing"),
        ([f"--from={SOURCE}", "--workdir=runs/x", "--out=y"], "--workdir stands with --to"),
        (
            [f"--from={SOURCE}", "--weights=x.safetensors", "--out=y.safetensors"],
            "is a file: give the folder",
        ),
        ([f"--from={SOURCE}", "--weights=x.pt", "--out=y"], "is a pickle"),
        (["--from=timm:vit_tinny_patch16_224", "--weights=x.safetensors", "--out=y"], "vit_tiny_patch16_224"),
    ],
)
def test_wrong_requests_end_in_one_line(arguments, said):
    _, errors = drive("convert", *arguments, code=2)
    assert said in errors


def test_a_damaged_file_is_a_failure_and_leaves_nothing(tmp_path, file):
    file.write_bytes(file.read_bytes()[:-10])
    _, errors = drive("convert", f"--from={SOURCE}", f"--weights={file}", f"--out={tmp_path}/ours", code=1)
    assert "no sound safetensors" in errors
    assert not (tmp_path / "ours").exists()


def test_the_configuration_may_be_a_file_or_lie_in_the_folder(tmp_path, file, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    inwards(file, tmp_path / "one", config=str(path))
    inwards(tmp_path, tmp_path / "two")
    one, two = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "two"))
    assert one == two
    with pytest.raises(UsageError, match="neither a file nor JSON"):
        inwards(file, tmp_path / "three", config="nowhere.json")
    with pytest.raises(UsageError, match="--library_config is not JSON"):
        inwards(file, tmp_path / "three", config="{x")
    with pytest.raises(UsageError, match="--dtype is 'int8'"):
        inwards(file, tmp_path / "three", dtype="int8")


def test_what_was_changed_is_said(tmp_path, file, capsys):
    inwards(
        file,
        tmp_path / "out",
        config=json.dumps({**CONFIG, "img_size": 32, "num_classes": 3}),
        classes="replace",
    )
    said = capsys.readouterr().out
    assert "pos_embed [1, 5, 12] is resized." in said
    assert "head/kernel starts anew." in said


def test_shards_and_half_precision(tmp_path, file, capsys):
    config = json.dumps(CONFIG)
    inwards(file, tmp_path / "ours", config=config, dtype="bfloat16", shard_bytes=3000)
    assert (tmp_path / "ours" / "params.safetensors.index.json").is_file()
    converting.outwards(SOURCE, str(tmp_path / "ours"), str(tmp_path / "back"), 3000, False)
    assert (tmp_path / "back" / "model.safetensors.index.json").is_file()
    with pytest.raises(UsageError, match="exists already"):
        inwards(file, tmp_path / "ours", config=config)
