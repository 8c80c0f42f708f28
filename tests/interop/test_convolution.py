"""Convolutional families: every name map fits its model, and the authors' own names are read."""

import re

import jax
import numpy as np
import pytest

from effjax.errors import UsageError
from effjax.interop import load_pretrained
from effjax.interop.families import FAMILIES, timm_convnext, timm_focalnet, timm_poolformer
from tests.interop.test_fixtures import FIXTURES, read
from tests.interop.test_vision import resolved

# Whole networks: the whole suite has time for them.
pytestmark = pytest.mark.slow

TOY = dict(depths=(1, 1, 1, 1), num_classes=5)
NARROW = dict(dims=(4, 6, 8, 10))
FOCAL = dict(embed_dim=4)
CONVNEXT = "atto atto_ols atto_rms nano_ols tiny_hnf tiny large_mlp xxlarge"
KINDS = {
    **{f"timm:convnext_{name}": NARROW for name in CONVNEXT.split()},
    "timm:test_convnext3": NARROW,
    "timm:poolformer_s12": NARROW,
    "timm:focalnet_tiny_lrf": FOCAL,
    "timm:focalnet_huge_fl3": FOCAL,
}


@pytest.mark.parametrize("source", KINDS)
def test_names_of_timm_fit_every_structure(source):
    config = {**TOY, **KINDS[source]}
    if source == "timm:convnext_large_mlp":
        config["head_hidden_size"] = 7
    _, leaves, entries = resolved(source, config)
    named = sum(np.prod(e.joined, dtype=int) * np.prod(e.counts, dtype=int) for e in entries)
    assert named == sum(leaf.size for leaf in jax.tree.leaves(leaves))


def test_all_names_of_timm_stand_in_the_table():
    for module in (timm_convnext, timm_focalnet, timm_poolformer):
        assert all(f"timm:{name}" in FAMILIES for name in module.ARCHITECTURES)


# From timm's names to those of the authors' checkpoints, the way back from `OFFICIAL`.
TO_OFFICIAL = (
    (r"^stem\.", "downsample_layers.0."),
    (r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
    (r"\.blocks\.", "."),
    (r"\.conv_dw\.", ".dwconv."),
    (r"\.mlp\.fc(\d)\.", r".pwconv\1."),
    (r"^head\.norm\.", "norm."),
    (r"^head\.fc\.", "head."),
)


def test_the_authors_checkpoints_of_convnext_are_read():
    path = next(path for path in FIXTURES if path.stem == "timm_convnext_toy")
    source, config, weights, *_ = read(path)
    official = {}
    for name, array in weights.items():
        for pattern, replacement in TO_OFFICIAL:
            name = re.sub(pattern, replacement, name)
        official[name] = array
    assert {"downsample_layers.1.0.weight", "stages.1.1.dwconv.weight", "head.bias"} <= official.keys()
    _, expected = load_pretrained(source, weights, config)
    _, params = load_pretrained(source, official, config)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.parametrize(
    ("source", "config", "message"),
    [
        ("timm:convnext_tiny", dict(norm_layer="simplenorm"), "norm_layer is 'simplenorm'"),
        ("timm:convnext_tiny", dict(use_grn=True), "config.use_grn is read by nobody"),
        ("timm:convnext_tiny", dict(global_pool="catavgmax"), "global_pool is 'catavgmax'"),
        ("transformers:poolformer", dict(architectures=("PoolFormerModel",)), "no last norm"),
        ("transformers:focalnet", dict(hidden_dropout_prob=0.1), "there is no dropout"),
        ("transformers:convnext", dict(architectures=("ConvNextBackbone",)), "a classifier or a bare model"),
    ],
)
def test_what_is_not_understood_is_said(source, config, message):
    with pytest.raises(UsageError, match=message):
        FAMILIES[source].build({**FAMILIES[source].defaults, **config})
