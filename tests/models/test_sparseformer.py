"""SparseFormer: the published code's outputs, its operators, and a start from a ViT."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from flax.core import meta

from configs.vision import sparseformer
from effjax.config import build_kind
from effjax.errors import UsageError
from effjax.experiment import resolve
from effjax.layers.point_sampling import adjusted, box_encoding, initial_boxes, points_in, sampled
from effjax.measure.cost import count
from effjax.models import KINDS
from effjax.models.sparseformer import inherited


def model_of(**changes):
    section = dict(
        kind="sparseformer",
        dim=16,
        depth=2,
        classes=5,
        tokens=4,
        focus_dim=16,
        features=6,
        points=4,
        hidden=8,
        turns=2,
        block=dict(mixer=dict(kind="attention", heads=2), ffn=dict(kind="mlp"), epsilon=1e-5),
    )
    return build_kind(KINDS, section | changes, "config.model")


IMAGES = jax.random.normal(jax.random.key(0), (2, 24, 20, 3))


@pytest.fixture(scope="module")
def params():
    return meta.unbox(jax.jit(model_of().init)(jax.random.key(1), IMAGES))


def published(shapes):
    """The weights that were drawn for the recorded outputs."""
    rng = np.random.default_rng(7)
    weights = {name: (0.15 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
    weights["initial_roi.weight"] = np.abs(weights["initial_roi.weight"]) + np.array(
        [0, 0, 0.5, 0.5], np.float32
    )
    return weights


def ours(w):
    """The published names, here."""
    dense = lambda name: (
        {"kernel": w[f"{name}.weight"].T} | ({"bias": w[f"{name}.bias"]} if f"{name}.bias" in w else {})
    )
    scaled = lambda name: {"scale": w[f"{name}.weight"], "bias": w[f"{name}.bias"]}

    def attention(name, heads):
        width = w[f"{name}.proj.bias"].shape[0]
        kernel = w[f"{name}.qkv.weight"].reshape(3, heads, width // heads, width).transpose(0, 3, 1, 2)
        bias = w[f"{name}.qkv.bias"].reshape(3, heads, width // heads)
        parts = {
            key: {"kernel": kernel[i], "bias": bias[i]} for i, key in enumerate(("query", "key", "value"))
        }
        output = {"kernel": w[f"{name}.proj.weight"].T.reshape(heads, width // heads, width)}
        return parts | {"output": output | {"bias": w[f"{name}.proj.bias"]}}

    def block(name, heads):
        return {
            "mixer": attention(f"{name}.attn", heads),
            "mixer_norm": scaled(f"{name}.norm1"),
            "ffn": {"expand": dense(f"{name}.mlp.fc1"), "contract": dense(f"{name}.mlp.fc2")},
            "ffn_norm": scaled(f"{name}.norm2"),
        }

    def sampling(name):
        made = dense(f"{name}.adaptive_mixing.parameter_generator.2")
        split = 6 * 6
        offsets = dense(f"{name}.roi_offset_module.1")["kernel"]
        return {
            "points": w[f"{name}.roi_offset_bias"].reshape(4, 2),
            "moves": {"kernel": offsets.reshape(-1, 4, 2)},
            "moves_norm": scaled(f"{name}.roi_offset_module.0"),
            "mixing_norm": scaled(f"{name}.adaptive_mixing.parameter_generator.0"),
            "mixing_hidden": dense(f"{name}.adaptive_mixing.parameter_generator.1"),
            "channels": {
                "kernel": made["kernel"][:, :split].reshape(-1, 6, 6),
                "bias": made["bias"][:split].reshape(6, 6),
            },
            "places": {
                "kernel": made["kernel"][:, split:].reshape(-1, 32, 4),
                "bias": made["bias"][split:].reshape(32, 4),
            },
            "contract": dense(f"{name}.adaptive_mixing.out_proj"),
        }

    def look(name):
        return {
            "sampling": sampling(name),
            "place_norm": scaled(f"{name}.pe_transition.0"),
            "place": dense(f"{name}.pe_transition.1"),
        }

    blocks = [block(f"layers.{i}", 2) for i in (3, 4)]
    return {
        "early": {
            "conv": {
                "kernel": w["feat_extractor.conv1.weight"].transpose(2, 3, 1, 0),
                "bias": w["feat_extractor.conv1.bias"],
            }
        },
        "latent_token": w["initial_embedding.weight"],
        "boxes": w["initial_roi.weight"],
        "stages": w["layers.0.stage_embedding.weight"],
        "focus": look("layers.0")
        | block("layers.0", 1)
        | {
            "adjust_norm": scaled("layers.0.roi_adjust_module.0"),
            "adjust_hidden": dense("layers.0.roi_adjust_module.1"),
            "adjust": dense("layers.0.roi_adjust_module.3"),
        },
        "widen": dense("layers.1.0"),
        "last_look": look("layers.2"),
        "class_token": w["cls_embedding.weight"],
        "blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *blocks),
        "norm": scaled("norm"),
        "head": dense("proj"),
    }


def test_outputs_are_those_of_the_published_code():
    with np.load(Path(__file__).parent / "fixtures" / "sparseformer.npz") as data:
        recorded = dict(data)
    weights = ours(published(json.loads(str(recorded["shapes"]))))
    model = model_of(dim=128, focus_dim=64, tokens=5, hidden=12)
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), recorded["images"])["params"])
    assert jax.tree.map(np.shape, weights) == jax.tree.map(np.shape, shapes)
    run = jax.jit(lambda params, images: model.apply({"params": params}, images, mutable=["tokens"]))
    logits, sown = run(weights, recorded["images"])
    np.testing.assert_allclose(logits, recorded["logits"], atol=2e-5)
    np.testing.assert_allclose(sown["tokens"]["boxes"][0], recorded["boxes"], atol=2e-5)


def test_a_point_is_read_as_scipy_reads_it():
    rng = np.random.default_rng(0)
    maps = rng.standard_normal((1, 5, 7, 2)).astype(np.float32)
    points = rng.uniform(-0.3, 1.3, (1, 4, 9, 2)).astype(np.float32)
    got = np.asarray(jax.jit(sampled)(maps, points))
    at = points[0] * np.array([7, 5]) - 0.5  # x, y in pixels
    for channel in range(2):
        expected = scipy.ndimage.map_coordinates(
            maps[0, :, :, channel].astype(np.float64), [at[..., 1], at[..., 0]], order=1, mode="nearest"
        )
        np.testing.assert_allclose(got[0, :, :, channel], expected, atol=1e-5)


def test_the_gradient_of_a_point_is_that_of_finite_differences():
    maps = jax.random.normal(jax.random.key(0), (1, 6, 6, 3))
    points = jnp.array([[[[0.31, 0.52], [0.71, 0.23]]]])
    total = lambda points: jnp.sum(sampled(maps, points) ** 2)
    slope = jax.grad(total)(points)
    for place in np.ndindex(points.shape):
        step = jnp.zeros_like(points).at[place].set(1e-3)
        np.testing.assert_allclose(
            slope[place], (total(points + step) - total(points - step)) / 2e-3, rtol=2e-2
        )


def test_boxes_on_a_grid_and_points_at_pixel_centres_are_patches():
    """Nine points spread evenly in a box of 3 x 3 pixels, as wide as they are spread, are its pixels."""
    maps = jax.random.normal(jax.random.key(1), (1, 6, 9, 4))
    corners = [(x / 3, y / 2) for y in range(2) for x in range(3)]
    boxes = jnp.array([[[x, y, x + 1 / 3, y + 1 / 2] for x, y in corners]])
    place = (jnp.arange(3) - 1.0) / 3
    offsets = jnp.stack(jnp.meshgrid(place, place, indexing="xy"), axis=-1).reshape(1, 1, 9, 2)
    spread = 3 * jnp.std(offsets, axis=2, keepdims=True, ddof=1)
    centre, size = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    wide = jnp.concatenate(
        [centre - size * spread[:, :, 0] / 2, centre + size * spread[:, :, 0] / 2], axis=-1
    )
    points = points_in(wide, jnp.broadcast_to(offsets, (1, 6, 9, 2)), epsilon=0.0)
    seen = sampled(maps, points)  # [1, 6, 9, 4]
    patches = maps.reshape(1, 2, 3, 3, 3, 4).transpose(0, 1, 3, 2, 4, 5).reshape(1, 6, 9, 4)
    np.testing.assert_allclose(seen, patches, atol=1e-5)


def test_boxes_move_and_stretch_and_stay_finite():
    boxes = jnp.array([[[0.2, 0.2, 0.6, 0.4]]])
    np.testing.assert_allclose(adjusted(boxes, jnp.zeros((1, 1, 4))), boxes, atol=1e-6)
    moved = adjusted(boxes, jnp.array([[[0.5, -1.0, jnp.log(2.0), 0.0]]]))
    np.testing.assert_allclose(moved, [[[0.2, 0.0, 1.0, 0.2]]], atol=1e-6)
    flat = adjusted(jnp.array([[[0.5, 0.5, 0.5, 0.5]]]), jnp.ones((1, 1, 4)))
    assert jnp.isfinite(flat).all()
    first = initial_boxes(6)
    np.testing.assert_allclose(
        first[:4], [[0, 0, 0.5, 0.5], [0, 0.5, 0.5, 1], [0.5, 0, 1, 0.5], [0.5, 0.5, 1, 1]]
    )
    np.testing.assert_allclose(first[4:], [[0, 0, 1, 1]] * 2)
    assert box_encoding(boxes, 16).shape == (1, 1, 16)


def test_a_larger_picture_costs_the_early_map_alone(params):
    model = model_of()
    cost = lambda side: count(model.apply, params, jnp.zeros((1, side, side, 3))).macs
    assert cost(64) - cost(32) == (32 * 32 - 16 * 16) * 49 * 3 * 6


@pytest.mark.slow
def test_the_large_one_costs_less_than_a_tenth_of_its_teacher():
    """49 tokens for 577: ViT-L/16 on 384 pixels."""
    task = resolve(sparseformer.get_config("augreg-large")).task
    macs = []
    for model, side in ((task.model, 224), (task.teacher, task.teacher_size)):
        images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
        held = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), images))
        macs.append(count(model.apply, held, images).macs)
    assert task.model.tokens + 1 == 49
    assert task.teacher.patch_grid((384, 384)) == (24, 24)
    assert macs[0] < macs[1] / 10


def test_gradients_reach_every_parameter(params):
    model = model_of()
    keys = jax.random.split(jax.random.key(3), len(jax.tree.leaves(params)))
    leaves, tree = jax.tree.flatten(params)
    moved = jax.tree.unflatten(
        tree, [x + 0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    )
    gradients = jax.jit(jax.grad(lambda p: jnp.sum(model.apply(p, IMAGES) ** 2)))(moved)
    for path, leaf in jax.tree.leaves_with_path(gradients):
        assert jnp.isfinite(leaf).all(), path
        if "key']['bias" not in jax.tree_util.keystr(path):  # a softmax does not see it
            assert jnp.any(leaf != 0), path


def test_gradients_behind_the_boxes_are_those_of_finite_differences(params):
    """The encoding of the boxes passes no gradient to what moves them; all behind them is differentiable."""
    model, held = model_of(), dict(params["params"])
    held["head"] = jax.tree.map(lambda x: jax.random.normal(jax.random.key(6), x.shape), held["head"])
    names = ("last_look", "widen", "class_token", "blocks", "norm", "head")
    part = {name: held.pop(name) for name in names}
    loss = jax.jit(lambda part: jnp.sum(jnp.sin(model.apply({"params": held | part}, IMAGES))))
    slope = jax.jit(jax.grad(loss))(part)
    length = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(slope)))
    at = lambda s: jax.tree.map(lambda p, g: p + s / length * g, part, slope)
    step = 1e-3
    np.testing.assert_allclose((loss(at(step)) - loss(at(-step))) / (2 * step), length, rtol=2e-2)


def test_it_starts_from_the_last_blocks_of_a_vit(params):
    block = dict(mixer=dict(kind="attention", heads=2), ffn=dict(kind="mlp"), epsilon=1e-5)
    vit = build_kind(
        KINDS, dict(kind="vit", patch=4, dim=16, depth=3, classes=5, block=block), "config.model"
    )
    teacher = meta.unbox(jax.jit(vit.init)(jax.random.key(5), IMAGES[:, :20]))["params"]
    fresh = params["params"]
    taken = inherited(fresh, teacher)
    assert set(taken) == {"blocks", "class_token", "norm", "head"}
    for got, wanted in zip(jax.tree.leaves(taken["blocks"]), jax.tree.leaves(teacher["blocks"]), strict=True):
        np.testing.assert_array_equal(got, wanted[1:])
    np.testing.assert_array_equal(taken["class_token"], teacher["class_token"])
    assert "class_token" not in inherited(fresh, {n: teacher[n] for n in ("blocks", "norm")})
    narrow = teacher | {"norm": jax.tree.map(lambda x: x[..., :1], teacher["norm"])}
    with pytest.raises(UsageError, match="norm of the ViT does not fit"):
        inherited(fresh, narrow)
    with pytest.raises(UsageError, match="wants 2 blocks and the ViT has 1"):
        inherited(fresh, teacher | {"blocks": jax.tree.map(lambda x: x[:1], teacher["blocks"])})


@pytest.mark.slow
def test_tuned_blocks_are_the_first_of_the_cortex(params):
    """The same network as in one piece, and inherited in the same order."""
    whole, split = params["params"], model_of(tuned=1)
    shapes = meta.unbox(jax.eval_shape(split.init, jax.random.key(0), IMAGES)["params"])
    one = inherited(shapes, whole)
    held = whole | one
    for name, at in (("tuned_blocks", slice(0, 1)), ("blocks", slice(1, 2))):
        for got, wanted in zip(jax.tree.leaves(held[name]), jax.tree.leaves(whole["blocks"]), strict=True):
            np.testing.assert_array_equal(got, wanted[at])
    features = [
        jax.jit(model.clone(classes=0).apply)({"params": p}, IMAGES)
        for model, p in ((model_of(), whole), (split, held))
    ]
    np.testing.assert_allclose(*features, atol=1e-5)
    for tuned in (-1, 2):
        with pytest.raises(UsageError, match="must leave some of the 2 blocks"):
            model_of(tuned=tuned)


def test_widths_without_places_for_boxes_are_refused():
    for changes, message in ((dict(focus_dim=18), "multiple of 4"), (dict(focus_dim=96), "multiple of 64")):
        with pytest.raises(UsageError, match=message):
            jax.eval_shape(model_of(**changes).init, jax.random.key(0), IMAGES)
