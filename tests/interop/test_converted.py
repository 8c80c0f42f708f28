import json

import jax
import numpy as np
import pytest

from effjax import models
from effjax.config import build_kind
from effjax.errors import RunError, UsageError
from effjax.ffn.mlp import MLP
from effjax.interop import export, export_to, load_converted, load_pretrained, save_converted
from effjax.interop.converted import section
from effjax.interop.weights import closing, open_weights
from effjax.mixers.attention import Attention
from effjax.models.blocks.metaformer import Block
from effjax.models.vit import ViT
from tests.interop.toys import CONFIG, SOURCE, weights


@pytest.mark.parametrize("shard_bytes", [10**9, 2000])
def test_there_and_back_through_the_disk(tmp_path, shard_bytes):
    tensors = weights()
    model, params = load_pretrained(SOURCE, tensors, CONFIG)
    save_converted(tmp_path / "ours", model, params, SOURCE, CONFIG, shard_bytes=shard_bytes)
    again, read, source = load_converted(tmp_path / "ours")
    assert (again, source) == (model, SOURCE)
    assert jax.tree.structure(read) == jax.tree.structure(params)
    assert jax.tree.all(jax.tree.map(np.array_equal, read, params))
    files = export_to(tmp_path / "theirs", again, read, source, shard_bytes=shard_bytes)
    assert (len(files) > 1) == (shard_bytes == 2000)
    with closing(open_weights(tmp_path / "theirs")) as opened:
        assert opened.specs.keys() == tensors.keys()
        for name, array in tensors.items():
            out = np.empty(array.shape, array.dtype)
            opened.read(name, out)
            assert out.tobytes() == array.tobytes()


def test_the_section_builds_the_model_again():
    block = Block(Attention(heads=4, qk_norm=True), MLP(hidden=7), layer_scale=0.5)
    model = ViT(block, patch=4, dim=16, depth=3, classes=2, pool="mean")
    written = section(model, models.KINDS)
    assert written["block"]["mixer"] == {"kind": "attention", "heads": 4, "qk_norm": True}
    assert "remat" not in written  # a default
    assert build_kind(models.KINDS, json.loads(json.dumps(written)), "config.model") == model


def test_a_model_that_no_config_can_name_is_refused():
    with pytest.raises(UsageError, match="MLP is none of the kinds"):
        section(MLP(), models.KINDS)


def test_parameters_that_the_target_cannot_name_are_listed():
    model, params = load_pretrained(SOURCE, weights(), CONFIG)
    params["rotary"] = {"table": params.pop("norm")["scale"]}
    with pytest.raises(UsageError) as error:
        export(model, params, SOURCE)
    message = str(error.value)
    assert message.startswith(f"{SOURCE} has no names for this ViT")
    assert "norm/scale is in the name map and not in the model" in message
    assert "rotary/table [12] is in the model and not in the name map" in message


def test_a_folder_of_something_else(tmp_path):
    with pytest.raises(UsageError, match=r"no config\.json"):
        load_converted(tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_size": 3}')
    with pytest.raises(RunError, match=r"config\.json' is not what"):
        load_converted(tmp_path)


def test_parameters_of_another_model_are_listed(tmp_path):
    model, params = load_pretrained(SOURCE, weights(), CONFIG)
    save_converted(tmp_path / "ours", model, params, SOURCE, CONFIG)
    file = tmp_path / "ours" / "config.json"
    content = json.loads(file.read_text())
    content["model"]["depth"] = 3
    file.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"blocks/mixer_norm/scale\s+expected \[3, 12\]\s+found \[2, 12\]"):
        load_converted(tmp_path / "ours")


def test_exported_tensors_can_be_given_to_the_library_s_own_writer(tmp_path):
    from safetensors.numpy import load_file, save_file

    tensors = weights()
    model, params = load_pretrained(SOURCE, tensors, CONFIG)
    save_file(export(model, params, SOURCE), tmp_path / "x.safetensors")
    read = load_file(tmp_path / "x.safetensors")
    assert all(np.array_equal(read[name], array) for name, array in tensors.items())
