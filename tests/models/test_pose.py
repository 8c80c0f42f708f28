"""MixSTE and its hourglass: the published code's outputs and sizes, and what lies between."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.config import build_kind
from effjax.data.builders.motion import draw
from effjax.errors import UsageError
from effjax.measure import count
from effjax.models import KINDS
from effjax.models.pose import Hourglass, Recover, interpolated, kept_frames
from effjax.tokens.tokens import rows

FIXTURE = Path(__file__).parent / "fixtures" / "mixste.npz"
CLIP = jax.random.normal(jax.random.key(0), (2, 9, 4, 2))


def pose(heads=2, **changes):
    block = dict(mixer=dict(kind="attention", heads=heads), ffn=dict(kind="mlp", ratio=2.0))
    section = dict(kind="pose", space=block, time=block, frames=9, joints=4, dim=12, depth=3)
    return build_kind(KINDS, section | changes, "config.model")


WAIST = dict(after=2, keep=5, heads=2)


def params_of(model, clip=CLIP):
    params = meta.unbox(jax.jit(model.init)(jax.random.key(1), clip))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [leaf + 0.2 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved)


def block(theirs, prefix, heads):
    """One block of the published code as one of ours."""
    t = lambda name: theirs[f"{prefix}.{name}"]
    c = t("norm1.weight").shape[0]
    split = lambda name, shape: np.split(t(f"attn.qkv.{name}"), 3)
    parts = zip(("query", "key", "value"), split("weight", c), split("bias", c), strict=True)
    mixer = {
        name: {"kernel": w.T.reshape(c, heads, -1), "bias": b.reshape(heads, -1)} for name, w, b in parts
    }
    mixer["output"] = {"kernel": t("attn.proj.weight").T.reshape(heads, -1, c), "bias": t("attn.proj.bias")}
    return {
        "mixer_norm": {"scale": t("norm1.weight"), "bias": t("norm1.bias")},
        "mixer": mixer,
        "ffn_norm": {"scale": t("norm2.weight"), "bias": t("norm2.bias")},
        "ffn": {
            ours: dense(theirs, f"{prefix}.mlp.{fc}") for ours, fc in (("expand", "fc1"), ("contract", "fc2"))
        },
    }


def dense(theirs, prefix):
    return {"kernel": theirs[f"{prefix}.weight"].T, "bias": theirs[f"{prefix}.bias"]}


def converted(theirs, depth, heads):
    """The published weights as a tree of ours."""
    layers = [
        {
            ours: block(theirs, f"{name}blocks.{i}", heads)
            for ours, name in (("space", "STE"), ("time", "TTE"))
        }
        for i in range(depth)
    ]
    affine = lambda name: {"scale": theirs[f"{name}.weight"], "bias": theirs[f"{name}.bias"]}
    ours = {
        "embed": dense(theirs, "Spatial_patch_to_embedding"),
        "joint_positions": theirs["Spatial_pos_embed"][0],
        "frame_positions": theirs["Temporal_pos_embed"][0],
        "space_norm": affine("Spatial_norm"),
        "time_norm": affine("Temporal_norm"),
        "first": layers[0],
        "blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *layers[1:]),
        "norm": affine("head.0"),
        "head": dense(theirs, "head.1"),
    }
    if "x_token" in theirs:
        attention = {
            name: dense(theirs, f"cross_attention.linear_{name[0]}") for name in ("query", "key", "value")
        }
        c = theirs["x_token"].shape[-1]
        for part in attention.values():
            part["kernel"], part["bias"] = (
                part["kernel"].reshape(c, heads, -1),
                part["bias"].reshape(heads, -1),
            )
        output = dense(theirs, "cross_attention.proj")
        output["kernel"] = output["kernel"].reshape(heads, -1, c)
        ours["recover"] = attention | {"output": output, "queries": theirs["x_token"][0]}
        ours["kept_positions"] = theirs["pos_embed_token"][0]
    return {"params": jax.tree.map(jnp.asarray, ours)}


@pytest.mark.parametrize(("name", "waist"), [("mixste", None), ("hot_mixste", WAIST)])
def test_outputs_are_those_of_the_published_code(name, waist):
    with np.load(FIXTURE) as data:
        start = f"{name}/weight/"
        theirs = {key.removeprefix(start): data[key] for key in data.files if key.startswith(start)}
        clip, expected = data["input"], data[f"{name}/output"]
    model = pose(hourglass=waist)
    params = converted(theirs, 3, 2)
    held = jax.eval_shape(model.init, jax.random.key(0), clip)
    assert jax.tree.map(jnp.shape, meta.unbox(held)) == jax.tree.map(jnp.shape, params)
    got = jax.jit(model.apply)(params, clip)
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())


def published(waist):
    return pose(heads=8, frames=243, joints=17, dim=512, depth=8, hourglass=waist)


@pytest.mark.parametrize(
    ("waist", "parameters", "gigaflops", "ours"),
    [(None, 33_783_811, 277.25, 1.0), (dict(after=3, keep=81), 35_000_323, 167.52, 0.988)],
    ids=["mixste", "hot"],
)
def test_sizes_are_the_published_ones(waist, parameters, gigaflops, ours):
    """The tables count a multiply-accumulate as two and leave out products of activations with each other.

    Published queries are projected for every joint; here once.
    """
    model = published(waist)
    clip = jax.ShapeDtypeStruct((1, 243, 17, 2), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), clip)
    cost = count(model.apply, meta.unbox(params), clip)
    assert cost.parameters == parameters
    frames, c, kept = 243, 512, 81 if waist else 243
    layer = lambda f: (
        2 * 17 * f * (17 + f) * c
    )  # attention of a layer: joints with joints, frames with frames
    products = 8 * layer(frames) if waist is None else 3 * layer(frames) + 5 * layer(kept)
    if waist:
        products += 2 * 17 * frames * kept * c + frames**2 * c  # recovering, and distances
    assert 2 * (cost.macs - products) / 1e9 == pytest.approx(gigaflops * ours, rel=2e-3)


@pytest.mark.parametrize("recover", ["attention", "linear"])
@pytest.mark.parametrize("select", ["density_peaks", "uniform"])
def test_every_frame_comes_back(select, recover):
    model = pose(hourglass=WAIST | dict(select=select, recover=recover))
    got, sown = jax.jit(lambda p, x: model.apply(p, x, mutable=["tokens"]))(params_of(model), CLIP)
    assert got.shape == (2, 9, 4, 3)
    places = np.asarray(sown["tokens"]["frames"][0])
    assert places.shape == (2, 5)
    assert (np.diff(places) > 0).all()
    if select == "uniform":
        np.testing.assert_array_equal(places[0], [0, 2, 4, 6, 8])


def test_keeping_all_frames_is_the_network_without_a_waist():
    plain = pose()
    params = params_of(plain)
    model = pose(hourglass=WAIST | dict(keep=9, recover="linear"))
    held = {"params": params["params"] | {"kept_positions": jnp.zeros((9, 12))}}
    expected = jax.jit(plain.apply)(params, CLIP)
    atol = 1e-6 * float(jnp.max(jnp.abs(expected)))  # another program, which adds up in another order
    np.testing.assert_allclose(jax.jit(model.apply)(held, CLIP), expected, atol=atol, rtol=0)


def test_straight_lines_join_the_frames_that_are_kept():
    x = jax.random.normal(jax.random.key(4), (2, 4, 3, 5))
    places = jnp.array([[0, 2, 3, 8], [1, 4, 5, 6]])
    got = np.asarray(interpolated(x, places, 9))
    for b in range(2):
        for joint in range(3):
            for c in range(5):
                expected = np.interp(np.arange(9), places[b], x[b, :, joint, c])
                np.testing.assert_allclose(got[b, :, joint, c], expected, atol=1e-6)


def test_frames_are_chosen_by_the_mean_over_joints():
    """Three still poses, held for unequal times: each keeps a frame, wherever an even grid would look."""
    still = jax.random.normal(jax.random.key(5), (3, 4, 6))[np.repeat(np.arange(3), [1, 2, 13])]
    x = still[None] + 1e-3 * jax.random.normal(jax.random.key(6), (1, 16, 4, 6))
    kept = np.asarray(kept_frames(Hourglass(after=1, keep=3), x))[0]
    assert [np.searchsorted([1, 3], k, side="right") for k in kept] == [0, 1, 2]


def test_chosen_frames_tell_more_of_bursts_than_even_ones():
    """A third of the frames of drawn clips, and straight lines between: half the error."""
    drawn = [draw(number) for number in range(16)]
    clips, seen = (jnp.asarray(np.stack([one[name] for one in drawn])) for name in ("joints", "seen"))
    errors = {}
    for select in ("density_peaks", "uniform"):
        places = kept_frames(Hourglass(after=1, keep=21, select=select), seen.reshape(16, 64, 1, 22))
        lines = interpolated(rows(clips, places), places, 64)
        errors[select] = float(jnp.linalg.norm(lines - clips, axis=-1).mean())
    assert errors["density_peaks"] < 0.5 * errors["uniform"]


def test_recovering_does_not_know_the_order_of_frames():
    """Keys have no positions of their own: those of the frames are added where they are kept."""
    module, x = Recover(9, 2), jax.random.normal(jax.random.key(7), (2, 5, 4, 12))
    params = params_of(module, x)
    np.testing.assert_allclose(module.apply(params, x[:, ::-1]), module.apply(params, x), atol=1e-5)


def test_gradients_reach_every_parameter():
    model = pose(depth=2, hourglass=WAIST | dict(after=1))
    params = params_of(model)
    loss = jax.jit(lambda p: jnp.sum(jnp.sin(model.apply(p, CLIP))))
    grads = jax.grad(loss)(params)
    flat = {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(grads)}
    still = [name for name, g in flat.items() if float(jnp.abs(g).max()) == 0]
    assert still == []


WRONG = {
    "depth=1": dict(depth=1),
    r"hourglass\.after=3 is not between 1 and 2": dict(hourglass=dict(after=3, keep=2)),
    r"hourglass\.keep=10 is not between 1 and the 9": dict(hourglass=dict(after=1, keep=10)),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_is_refused(message):
    with pytest.raises(UsageError, match=f"config.model: {message}"):
        pose(**WRONG[message])


def test_clips_and_heads_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="9 frames of 4 joints, not 8 of 4"):
        jax.eval_shape(pose().init, jax.random.key(0), CLIP[:, 1:])
    with pytest.raises(UsageError, match=r"hourglass\.heads=8 does not divide the width 12"):
        jax.eval_shape(pose(hourglass=dict(after=1, keep=3)).init, jax.random.key(0), CLIP)
