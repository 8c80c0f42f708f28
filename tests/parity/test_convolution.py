"""What the table of cases leaves open of convolutional backbones: names, and gradients that are zero."""

import pytest
import timm
import timm.models.convnext
import timm.models.focalnet

from effjax.interop.families import timm_convnext, timm_focalnet, timm_poolformer
from tests.parity.case import compare_gradients
from tests.parity.cases import CASES

# Not understood here: norms that only divide, and the second version.
LEFT_OUT = ("convnext_zepto", "convnextv2")


@pytest.mark.parametrize("family", [timm_convnext, timm_focalnet])
def test_every_architecture_of_timm_is_known_with_its_arguments(family, monkeypatch):
    module = timm.models.convnext if family is timm_convnext else timm.models.focalnet
    made = {}
    monkeypatch.setattr(
        module, "build_model_with_cfg", lambda cls, name, pretrained, **kw: made.update({name: kw})
    )
    for name in timm.list_models(module=module.__name__.rpartition(".")[2]):
        if name.startswith(LEFT_OUT):
            continue
        getattr(module, name)()
        arguments = {k: v for k, v in made[name].items() if k not in ("pretrained_filter_fn", "feature_cfg")}
        arguments["num_classes"] = module.default_cfgs[name].default.num_classes
        assert family.build(family.ARCHITECTURES[name]) == family.build(arguments), name
    assert set(family.ARCHITECTURES) == {n for n in made if not n.startswith(LEFT_OUT)}


def test_every_poolformer_of_timm_is_known():
    for name in timm.list_models("poolformer_*"):
        theirs = timm.create_model(name)
        ours = timm_poolformer.build(timm_poolformer.ARCHITECTURES[name])
        assert [len(stage.blocks) for stage in theirs.stages] == [stage.depth for stage in ours.stages]
        assert [info["num_chs"] for info in theirs.feature_info] == [stage.dim for stage in ours.stages]
        scale = theirs.stages[0].blocks[0].layer_scale1.scale[0].item()
        assert scale == pytest.approx(ours.stages[0].blocks[0].layer_scale)


@pytest.mark.parametrize("name", ["timm_poolformer_toy", "transformers_poolformer"])
def test_gradients_of_poolformer(name):
    """A pooled constant less itself is zero: so is the gradient of the bias in front, but for rounding."""
    differences = compare_gradients(CASES[name])
    assert len(differences) > 30
    wrong = {k: d for k, d in differences.items() if d > 1e-4}
    assert {k for k in wrong if not k.endswith(("norm1.bias", "before_norm.bias"))} == set()
