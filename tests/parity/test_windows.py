"""What the table of cases does not say of Swin Transformers: names of architectures, sizes, files."""

import inspect
import json

import jax.numpy as jnp
import numpy as np
import pytest
import timm
import timm.models.swin_transformer
import timm.models.swin_transformer_v2
import torch
from safetensors.numpy import load_file

from effjax.interop import export, load_pretrained
from effjax.interop.families.timm_swin import TimmSwin, build
from effjax.interop.families.timm_swins import architectures
from tests.parity.case import original, state
from tests.parity.cases import CASES

MODULES = {1: timm.models.swin_transformer, 2: timm.models.swin_transformer_v2}


@pytest.mark.parametrize("version", MODULES)
def test_every_architecture_of_timm_is_known_with_its_arguments(version, monkeypatch):
    module, made = MODULES[version], {}
    monkeypatch.setattr(
        module, "build_model_with_cfg", lambda cls, name, pretrained, **kw: made.update({name: kw})
    )
    names = timm.list_models(module=module.__name__.rpartition(".")[2])
    table = architectures(version)
    assert table.keys() == set(names)
    for name in names:
        module.__dict__[name]()
        published = module.default_cfgs[name].default
        understood = inspect.signature(TimmSwin).parameters
        arguments = {key: value for key, value in made[name].items() if key in understood}
        arguments.setdefault("img_size", published.input_size[-1])
        arguments["num_classes"] = published.num_classes
        assert build({**table[name], "version": version}) == build({**arguments, "version": version}), name


def test_another_window_and_picture_are_what_timm_makes_of_them():
    case = CASES["timm_swin_toy"]
    module = original(case)
    tensors = {name: array.copy() for name, array in state(module).items()}
    module.set_input_size(img_size=48, window_size=6)
    pictures = np.random.default_rng(0).standard_normal((2, 48, 48, 3), dtype=np.float32)
    with torch.no_grad():
        theirs = module(torch.from_numpy(pictures).permute(0, 3, 1, 2)).numpy()
    model, params = load_pretrained(case.source, tensors, {**case.config, "img_size": 48, "window_size": 6})
    ours = np.asarray(model.apply({"params": params}, jnp.asarray(pictures)))
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


@pytest.mark.parametrize(
    "name", [name for name in CASES if name.startswith("transformers_swin") and name[-4:] != "tiny"]
)
def test_files_of_transformers_are_read_and_written(name, tmp_path):
    case = CASES[name]
    module = original(case)
    module.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    model, params = load_pretrained(case.source, tmp_path, config)
    saved = load_file(tmp_path / "model.safetensors")
    written = export(model, params, case.source)
    assert saved.keys() == written.keys()
    for key, array in saved.items():
        np.testing.assert_array_equal(written[key], array)
