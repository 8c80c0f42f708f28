import dataclasses
import json
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.core import meta
from safetensors.numpy import save_file

from effjax.errors import RunError, UsageError
from effjax.interop import export, load_pretrained
from effjax.interop.load import contains_nan
from tests.interop.toys import CONFIG, SOURCE, weights


def load(tensors, config=None, **options):
    return load_pretrained(SOURCE, tensors, {**CONFIG, **(config or {})}, **options)


def test_parameters_are_the_tree_of_the_model():
    model, params = load(weights())
    images = jnp.zeros((1, 16, 16, 3))
    fresh = jax.eval_shape(lambda key: meta.unbox(model.init(key, images)), jax.random.key(0))
    assert jax.tree.map(jnp.shape, {"params": params}) == jax.tree.map(jnp.shape, fresh)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))


def test_a_file_gives_what_the_mapping_gives(tmp_path):
    tensors = weights()
    save_file(tensors, tmp_path / "model.safetensors")
    _, ours = load(tensors)
    _, read = load(tmp_path / "model.safetensors")
    _, found = load(tmp_path)
    assert jax.tree.all(jax.tree.map(np.array_equal, ours, read))
    assert jax.tree.all(jax.tree.map(np.array_equal, ours, found))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_bit_pattern_goes_in_and_out(dtype):
    tensors = weights(dtype=dtype)
    word = {2: np.uint16, 4: np.uint32}[np.dtype(dtype).itemsize]
    rng = np.random.default_rng(3)
    for array in tensors.values():  # also denormals, infinities and NaN with payloads
        array.reshape(-1).view(word)[:] = rng.integers(0, np.iinfo(word).max, array.size, word, endpoint=True)
    model, params = load(tensors, allow_nan=True)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(params))
    back = export(model, jax.device_put(params), SOURCE)
    assert back.keys() == tensors.keys()
    assert all(back[name].tobytes() == tensors[name].tobytes() for name in tensors)


def test_the_other_direction_is_exact_too():
    model, params = load(weights())
    _, again = load(export(model, params, SOURCE))
    assert jax.tree.all(jax.tree.map(np.array_equal, params, again))


def test_a_dtype_may_be_asked_for():
    tensors = weights(dtype=ml_dtypes.bfloat16)
    _, params = load(tensors, dtype=jnp.float32)
    assert params["class_token"].dtype == np.float32
    assert np.array_equal(params["class_token"], tensors["cls_token"][0].astype(np.float32))


@pytest.mark.parametrize("dtype", ["int8", "float99", jnp.int32])
def test_parameters_are_real_numbers(dtype):
    with pytest.raises(UsageError, match="parameters are float32"):
        load(weights(), dtype=dtype)


def test_a_head_shows_where_it_came_from():
    tensors = weights()
    _, params = load(tensors)
    key = tensors["blocks.1.attn.qkv.weight"][12:24].reshape(3, 4, 12)  # [heads, d, in]
    assert np.array_equal(params["blocks"]["mixer"]["key"]["kernel"][1], key.transpose(2, 0, 1))
    pixel = tensors["patch_embed.proj.weight"][:, 2, 3, 5]
    assert np.array_equal(params["embed"]["projection"]["kernel"][(3 * 8 + 5) * 3 + 2], pixel)


def test_one_message_lists_all_that_does_not_fit():
    tensors = weights()
    del tensors["blocks.0.attn.qkv.weight"], tensors["blocks.1.attn.qkv.weight"]
    tensors["norm.weight"] = np.ones(13, np.float32)
    tensors["extra.0.x"] = tensors["extra.1.x"] = np.ones((2, 3), np.float32)
    tensors["blocks.1.norm1.bias"] = np.ones(12, np.int32)
    tensors["\x1b[2J"] = np.ones(1, np.float32)
    with pytest.raises(UsageError) as error:
        load(tensors)
    lines = [" ".join(line.split()) for line in str(error.value).splitlines()]
    assert lines[0] == f"the mapping for {SOURCE}: the weights do not fit."
    assert "wrong shape norm.weight expected [12] found [13]" in lines
    assert "unexpected extra.{0-1}.x found [2, 3]" in lines
    assert "unexpected '\\x1b[2J' found [1]" in lines
    [missing] = [line for line in lines if line.startswith("missing")]
    assert missing.startswith("missing blocks.{0-1}.attn.qkv.weight expected [36, 12]")
    assert "blocks/mixer/query/kernel" in missing
    [integers] = [line for line in lines if line.startswith("wrong dtype")]
    assert "blocks.1.norm1.bias" in integers
    assert "int32" in integers


def test_layers_of_different_dtypes_are_refused():
    tensors = weights()
    tensors["blocks.1.norm1.bias"] = tensors["blocks.1.norm1.bias"].astype(np.float16)
    with pytest.raises(UsageError, match=r"mixed dtypes.*blocks\.1\.norm1\.bias is float16"):
        load(tensors)


def test_nan_names_its_tensor_unless_allowed():
    tensors = weights()
    tensors["blocks.1.mlp.fc1.weight"][3, 4] = np.nan
    with pytest.raises(RunError, match=r"'blocks\.1\.mlp\.fc1\.weight' holds NaN"):
        load(tensors)
    load(tensors, allow_nan=True)


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", "bfloat16", "float8_e5m2", "float8_e4m3fn"]
)
def test_nan_is_found_by_its_bits(dtype):
    dtype = jnp.dtype(dtype)
    word = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[dtype.itemsize]
    bits = np.arange(2**16 if dtype.itemsize > 1 else 2**8, dtype=np.uint64)
    bits = (bits << np.uint64(max(0, 8 * dtype.itemsize - 16))).astype(word)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = np.isnan(bits.view(dtype).astype(np.float64))
    assert expected.any()
    borders = np.flatnonzero(np.diff(expected))  # where numbers end and NaN begins
    some = sorted({*range(0, len(bits), 97), *borders, *(borders + 1)})
    assert [contains_nan(bits[i : i + 1].view(dtype)) for i in some] == expected[some].tolist()
    long = np.zeros(300_000, dtype)
    assert not contains_nan(long)
    long[-1] = np.nan
    assert contains_nan(long)


def test_another_number_of_classes_must_be_asked_for():
    tensors = weights()
    with pytest.raises(UsageError, match=r'head\.weight.*expected \[3, 12\].*classes="replace"'):
        load(tensors, dict(num_classes=3))
    said = []
    _, params = load(tensors, dict(num_classes=3), classes="replace", report=said.append)
    assert params["head"]["kernel"].shape == (12, 3)
    assert not params["head"]["kernel"].any()  # as the model starts its head
    assert "head/kernel starts anew." in said
    assert np.array_equal(params["class_token"], tensors["cls_token"][0])
    with pytest.raises(UsageError, match="classes is 'new'"):
        load(tensors, classes="new")


def test_replacing_keeps_a_classifier_that_fits():
    tensors = weights()
    _, params = load(tensors, classes="replace")
    assert np.array_equal(params["head"]["kernel"], tensors["head.weight"].T)


def test_a_classifier_may_be_left_out_or_lacking():
    with pytest.raises(UsageError, match=r"unexpected\s+head\.bias.*replace"):
        load(weights(), dict(num_classes=0))
    model, params = load(weights(), dict(num_classes=0), classes="replace")
    assert "head" not in params
    tensors = {name: array for name, array in weights().items() if "head" not in name}
    assert set(export(model, params, SOURCE)) == set(tensors)
    with pytest.raises(UsageError, match=r"missing\s+head\.weight.*replace"):
        load(tensors)
    _, params = load(tensors, classes="replace")
    assert params["head"]["kernel"].shape == (12, 5)


def test_another_picture_or_patch_resizes():
    said = []
    _, params = load(weights(), dict(img_size=(24, 40)), report=said.append)
    assert params["positions"].shape == (1 + 3 * 5, 12)
    assert said == ["pos_embed [1, 5, 12] is resized."]
    _, params = load(weights(), dict(patch_size=4, img_size=8))
    assert params["embed"]["projection"]["kernel"].shape == (4 * 4 * 3, 12)


def test_a_grid_that_is_not_square_must_be_told():
    tall = weights(img_size=(24, 8))  # 3 x 1 patches
    with pytest.raises(UsageError, match="source_grid"):
        load(tall)
    _, params = load(tall, source_grid=(3, 1))
    assert params["positions"].shape == (5, 12)


def test_a_grid_of_as_many_places_is_resized_where_told():
    tensors = weights(img_size=(8, 32))
    _, as_it_is = load(tensors, dict(img_size=(32, 8)))
    assert np.array_equal(as_it_is["positions"], tensors["pos_embed"][0])
    _, turned = load(tensors, dict(img_size=(32, 8)), source_grid=(1, 4))
    assert not np.array_equal(turned["positions"], tensors["pos_embed"][0])


def test_a_folder_brings_its_configuration(tmp_path):
    save_file(weights(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": "x", "num_classes": 5, "pretrained_cfg": {}, "model_args": CONFIG})
    )
    model, _ = load_pretrained(SOURCE, tmp_path)
    assert (model.dim, model.classes) == (12, 5)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(UsageError, match=r"config\.json' is not JSON"):
        load_pretrained(SOURCE, tmp_path)


def test_an_unknown_source_is_answered_with_the_nearest():
    with pytest.raises(UsageError, match="vit_tiny_patch16_224"):
        load_pretrained("timm:vit_tiny_patch16_24", {})
    with pytest.raises(UsageError, match=r"config\.depht"):
        load(weights(), dict(depht=3))


def test_a_pretrained_tag_is_no_part_of_the_architecture():
    load_pretrained(f"{SOURCE}.augreg_in21k", weights(), CONFIG)


def test_progress_counts_every_byte():
    seen = []
    tensors = weights()
    load(tensors, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (sum(array.nbytes for array in tensors.values()),) * 2
    assert len(seen) == len(tensors)


def test_a_training_free_change_takes_the_same_parameters():
    model, params = load(weights())
    images = jnp.ones((2, 16, 16, 3))
    other = model.clone(block=dataclasses.replace(model.block, epsilon=1.0))
    ours, theirs = (np.asarray(jax.jit(m.apply)({"params": params}, images)) for m in (model, other))
    assert ours.shape == theirs.shape
    assert not np.allclose(ours, theirs)
