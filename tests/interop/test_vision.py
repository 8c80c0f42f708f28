"""Families of vision: what a configuration becomes, and that every name map fits its model."""

import functools

import jax
import numpy as np
import pytest

from effjax.errors import UsageError
from effjax.interop import export, load_pretrained
from effjax.interop.families import vit
from effjax.interop.load import family_of, leaf_specs
from effjax.matching import named_leaves

SMALL = dict(img_size=28, patch_size=14, embed_dim=24, depth=2, num_heads=3, num_classes=5)
SIZES = {*SMALL, "mlp_ratio", "num_classes"}
ENCODER = dict(
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=40,
    image_size=16,
    patch_size=8,
)


def resolved(source, config, given=()):
    family = family_of(source)
    config = {**family.defaults, **config}
    if family.complete:
        config = family.complete(config, given)
    model = family.build(config)
    leaves = leaf_specs(model, family.inputs(model, config))
    return model, leaves, family.resolved(model, named_leaves(leaves), given)[1]


def weights(source, config, given=()):
    """Random tensors by the names that are most like the given ones."""
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(shape, dtype=np.float32)
        for entry in resolved(source, config, given)[2]
        for index in entry.indices()
        for name, shape in zip(entry.names(index), entry.shapes, strict=True)
    }


def kinds():
    """One architecture of timm for each structure."""
    found = {}
    for name, family in vit.TIMM.items():
        key = tuple(sorted((k, repr(v)) for k, v in family.defaults.items() if k not in SIZES))
        found.setdefault((key, "mlp_layer" in family.defaults), f"timm:{name}")
    return list(found.values())


@pytest.mark.parametrize("source", kinds())
def test_names_of_timm_fit_every_structure(source):
    _, leaves, entries = resolved(source, SMALL)
    named = sum(np.prod(e.joined, dtype=int) * np.prod(e.counts, dtype=int) for e in entries)
    assert named == sum(leaf.size for leaf in jax.tree.leaves(leaves))


def test_published_sizes_have_the_published_number_of_parameters():
    """The tables of timm's documentation, in millions."""
    for name, millions in {
        "vit_base_patch16_224": 86.57,
        "deit_base_distilled_patch16_224": 87.34,
        "vit_medium_patch16_reg4_gap_256": 38.88,
        "vit_giant_patch14_dinov2": 1136.48,
        "vit_so400m_patch14_siglip_384": 428.23,
    }.items():
        _, leaves, _ = resolved(f"timm:{name}", {})
        count = sum(leaf.size for leaf in jax.tree.leaves(leaves))
        assert round(count / 1e6, 2) == pytest.approx(millions, abs=0.011), name


def test_layers_of_timm_by_name_class_and_partial_object():
    class RmsNorm: ...

    class SiLU: ...

    build = family_of("timm:vit_base_patch16_224").build
    by_class = build({**SMALL, "norm_layer": functools.partial(RmsNorm, eps=1e-5), "act_layer": SiLU})
    by_name = build({**SMALL, "norm_layer": "rmsnorm", "norm_eps": 1e-5, "act_layer": "silu"})
    assert by_class == by_name
    assert by_name.block.norm == "rms"
    assert by_name.block.epsilon == 1e-5
    assert by_name.block.ffn.activation == "silu"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(global_pool="prr"), "config.global_pool is 'prr'"),
        (dict(act_layer="gelus"), "'gelu'"),
        (dict(block_fn="diffparallelscalingblock"), "config.block_fn"),
        (dict(mlp_layer="glumlp"), "config.mlp_layer"),
        (dict(attn_drop_rate=0.1), "attn_drop_rate is read by nobody"),
        (dict(depht=3), "'depth'"),
    ],
)
def test_what_is_not_understood_of_timm_is_named(change, message):
    with pytest.raises(UsageError, match=message):
        family_of("timm:vit_base_patch16_224").build({**SMALL, **change})


@pytest.mark.parametrize(
    ("tensor", "shape"),
    [
        ("vit.layers.0.attention.q_proj.weight", "modules"),
        ("vit.encoder.layer.0.attention.attention.query.weight", "files"),
    ],
)
def test_both_spellings_of_transformers_are_read(tensor, shape):
    given = {tensor, "classifier.weight"}
    tensors = weights("transformers:vit", ENCODER, given)
    assert tensor in tensors
    model, params = load_pretrained("transformers:vit", tensors, ENCODER)
    back = export(model, params, "transformers:vit", like=tensors)
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[name], tensors[name]) for name in tensors)
    in_files = export(model, params, "transformers:vit")
    assert (in_files.keys() == tensors.keys()) == (shape == "files")


def test_the_gate_of_dinov2_is_joined_in_files_and_apart_in_modules():
    source, config = "transformers:dinov2", dict(ENCODER, use_swiglu_ffn=True)
    tensors = weights(source, config, {"encoder.layer.0.mlp.gate_proj.weight"})
    model, params = load_pretrained(source, tensors, config)
    joined = export(model, params, source)["encoder.layer.1.mlp.weights_in.weight"]
    parts = [tensors[f"encoder.layer.1.mlp.{part}_proj.weight"] for part in ("gate", "up")]
    np.testing.assert_array_equal(joined, np.concatenate(parts))


@pytest.mark.parametrize(
    ("kind", "tensors", "expected"),
    [
        ("vit", ["classifier.bias"], dict(classes=2, representation=None)),
        ("vit", ["pooler.dense.bias"], dict(classes=0, representation=24)),
        ("vit", [], dict(classes=0, representation=None)),
        ("deit", ["classifier.bias"], dict(distillation=False, registers=1)),
        ("deit", ["cls_classifier.bias"], dict(distillation=True, registers=0)),
        ("dinov2", ["embeddings.mask_token", "classifier.bias"], dict(mask_token=True, pool="token_mean")),
        ("dinov2_with_registers", [], dict(mask_token=False, registers=4, positioned="class_and_patches")),
        ("ijepa", ["classifier.bias"], dict(pool="mean", class_token=False)),
    ],
)
def test_the_tensors_say_which_class_they_belong_to(kind, tensors, expected):
    model, _, _ = resolved(f"transformers:{kind}", ENCODER, tensors)
    assert {key: getattr(model, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(hidden_act="gleu"), "'gelu'"),
        (dict(attention_probs_dropout_prob=0.1), "attention weights are not dropped"),
        (dict(architectures=["ViTForMaskedImageModeling"]), "ViTForMaskedImageModeling"),
        (dict(patch_size=(8, 4)), "patches are square"),
        (dict(architectures=["ViTModel"], pooler_act="relu", add_pooling_layer=True), "pooler_act is 'relu'"),
    ],
)
def test_what_is_not_understood_of_transformers_is_named(change, message):
    with pytest.raises(UsageError, match=message):
        family_of("transformers:vit").build({**ENCODER, "model_type": "vit", **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(activation_fn="gelo"), "'gelu'"),
        (dict(out_channels=5), "out_channels is 5"),
        (dict(dropout=0.1), "dropout 0"),
        (dict(layers=3), "config.layers is read by nobody"),
    ],
)
def test_what_is_not_understood_of_diffusers_is_named(change, message):
    with pytest.raises(UsageError, match=message):
        family_of("diffusers:DiTTransformer2DModel").build(change)


def test_official_positions_are_left_out_and_not_missed():
    config = dict(input_size=8, hidden_size=24, depth=2, num_heads=2, num_classes=7)
    tensors = weights("official:DiT", config)
    table = {"pos_embed": np.zeros((1, 16, 24), np.float32)}
    told = []
    model, params = load_pretrained("official:DiT", {**tensors, **table}, config, report=told.append)
    assert any("pos_embed" in line for line in told)
    assert export(model, params, "official:DiT").keys() == tensors.keys()


def test_a_larger_picture_and_a_smaller_patch_are_resized():
    source = "timm:deit_base_distilled_patch16_224"
    tensors = weights(source, SMALL)
    model, params = load_pretrained(source, tensors, {**SMALL, "img_size": (28, 42), "patch_size": 7})
    assert params["positions"].shape == (2 + 4 * 6, 24)
    np.testing.assert_array_equal(params["positions"][:2], tensors["pos_embed"][0, :2])
    assert params["embed"]["projection"]["kernel"].shape == (7 * 7 * 3, 24)
    logits = model.apply({"params": params}, jax.numpy.ones((1, 28, 42, 3)))
    assert logits.shape == (1, 5)
