"""What the table of cases does not say: names of architectures, spellings of files, other picture sizes."""

import inspect
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
import timm
import timm.models.deit
import timm.models.vision_transformer
import torch
import transformers
from safetensors.numpy import load_file

from effjax.interop import export, load_pretrained
from effjax.interop.families.timm_vits import architectures
from effjax.interop.families.vit import TimmViT, build
from tests.parity import cases_vision
from tests.parity.case import compare_gradients, original, state
from tests.parity.cases import CASES

# Not understood here: differential attention, two attentions a layer, norms inside of the attention.
LEFT_OUT = r"vit_d(little|pwee|wee)_|vit_.*_18x2_|beit3_"


def _registered():
    modules = timm.models.vision_transformer, timm.models.deit
    return {
        name: module.default_cfgs[name].default
        for module in modules
        for name in timm.list_models(module=module.__name__.rpartition(".")[2])
    }


def test_every_architecture_of_timm_is_known_with_its_arguments(monkeypatch):
    made = {}
    for module in (timm.models.vision_transformer, timm.models.deit):
        monkeypatch.setattr(
            module, "build_model_with_cfg", lambda cls, name, pretrained, **kw: made.update({name: (cls, kw)})
        )
    table = architectures()
    for name, published in _registered().items():
        if re.search(LEFT_OUT, name):
            continue
        timm.models.vision_transformer.__dict__.get(name, timm.models.deit.__dict__.get(name))()
        cls, arguments = made[name]
        understood = inspect.signature(TimmViT).parameters
        arguments = {key: value for key, value in arguments.items() if key in understood}
        arguments.setdefault("img_size", published.input_size[-1])
        arguments["num_classes"] = published.num_classes
        arguments["distilled"] = cls is timm.models.deit.VisionTransformerDistilled
        assert build(table[name]) == build(arguments), name


VISION = [name for name in cases_vision.CASES if name.startswith("transformers_")]
TOYS = [name for name in VISION if name != "transformers_vit_base"]


@pytest.mark.parametrize("name", TOYS)
def test_files_of_transformers_are_read_and_written(name, tmp_path):
    case = CASES[name]
    module = original(case)
    module.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    model, params = load_pretrained(case.source, tmp_path, config)
    saved = load_file(tmp_path / "model.safetensors")
    written = export(model, params, case.source, like=saved)
    assert saved.keys() == written.keys()
    # By default, too; but 5.23 leaves a prefix out of ViT-MSN's layers that published files have.
    assert (export(model, params, case.source).keys() == saved.keys()) == (name != "transformers_vit_msn")
    for key, array in saved.items():
        np.testing.assert_array_equal(written[key], array)
    read = type(module).from_pretrained(tmp_path).state_dict()
    for key, array in export(model, params, case.source, like=read).items():
        np.testing.assert_array_equal(read[key].numpy(), array)


def test_another_picture_size_is_what_timm_makes_of_it():
    config = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5, reg_tokens=2)
    name = "vit_base_patch16_224"
    module = timm.create_model(name, **config).eval()
    tensors = {key: array.copy() for key, array in state(module).items()}
    module.set_input_size((24, 40))
    pictures = np.random.default_rng(0).standard_normal((2, 24, 40, 3), dtype=np.float32)
    with torch.no_grad():
        theirs = module(torch.from_numpy(pictures).permute(0, 3, 1, 2)).numpy()
    model, params = load_pretrained(f"timm:{name}", tensors, {**config, "img_size": (24, 40)})
    ours = np.asarray(model.apply({"params": params}, jnp.asarray(pictures)))
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


def test_the_masked_patches_of_dinov2():
    case = CASES["transformers_dinov2_model"]
    module = original(case)
    (pictures,) = map(jnp.asarray, case.inputs(np.random.default_rng(0)))
    masked = jnp.array([[True, False, True, False], [False, False, False, True]])
    with torch.no_grad():
        theirs = module(
            *(torch.from_numpy(np.array(a)) for a in (pictures.transpose(0, 3, 1, 2), masked))
        ).pooler_output
    model, params = load_pretrained(case.source, state(module), case.config)
    ours = np.asarray(model.apply({"params": params}, pictures, masked=masked))
    assert np.abs(ours - theirs.numpy()).max() < 1e-4 * np.abs(theirs.numpy()).max()
    assert np.abs(ours - np.asarray(model.apply({"params": params}, pictures))).max() > 1e-2


def test_a_config_without_architectures_is_told_by_the_tensors():
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    bare = transformers.ViTModel(config, add_pooling_layer=False)
    model, params = load_pretrained("transformers:vit", state(bare), config.to_dict())
    assert model.classes == 0
    assert model.representation is None
    assert export(model, params, "transformers:vit", like=state(bare)).keys() == state(bare).keys()


def test_gradients_of_diffusers():
    """A bias of all keys cancels in the softmax: what is left of its gradient is rounding."""
    case = CASES["diffusers_dit"]
    differences = compare_gradients(case)
    assert len(differences) > 40
    assert {k: d for k, d in differences.items() if d > 1e-4 and not k.endswith("to_k.bias")} == {}
