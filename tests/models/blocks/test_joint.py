"""The joint block against Stable Diffusion 3's of diffusers, recorded by tests/parity/record_joint.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.mixers.joint_attention import JointAttention
from effjax.models.blocks.joint import AdaLNAffine, JointBlock
from tests.models.official import FOLDER, drawn_again, translated

WIDTH, HEADS = 16, 2
LINEAR, TO_HEADS, OF_HEADS = "o i -> i o", "(h d) i -> i h d", "o (h d) -> h d o"


def attention_rows(theirs, ours):
    """Names of diffusers' joint `Attention`."""
    streams = {
        "image": ("to_q", "to_k", "to_v", "norm_q", "norm_k", "to_out.0"),
        "text": ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k", "to_add_out"),
    }
    rows = []
    for stream, (q, k, v, q_norm, k_norm, out) in streams.items():
        for name, own in ((q, "query"), (k, "key"), (v, "value")):
            rows.append((f"{theirs}.{name}.weight", f"{ours}/{stream}/{own}/kernel", TO_HEADS))
            rows.append((f"{theirs}.{name}.bias", f"{ours}/{stream}/{own}/bias", "(h d) -> h d"))
        for name, own in ((q_norm, "query_norm"), (k_norm, "key_norm")):
            rows.append((f"{theirs}.{name}.weight", f"{ours}/{stream}/{own}/scale", None))
        rows.append((f"{theirs}.{out}.weight", f"{ours}/{stream}_output/kernel", OF_HEADS))
        rows.append((f"{theirs}.{out}.bias", f"{ours}/{stream}_output/bias", None))
    return rows


def ffn_rows(theirs, ours):
    """Names of diffusers' `FeedForward`."""
    return [
        (f"{theirs}.net.{layer}.{leaf}", f"{ours}/{own}/{kind}", layout)
        for layer, own in (("0.proj", "expand"), ("2", "contract"))
        for leaf, kind, layout in (("weight", "kernel", LINEAR), ("bias", "bias", None))
    ]


def without_silent_text(tensors, prefix=""):
    """The last block's text asks nothing that is heard."""
    silent = tuple(f"{prefix}attn.{name}." for name in ("add_q_proj", "norm_added_q"))
    return {name: value for name, value in tensors.items() if not name.startswith(silent)}


def sd3(names_and_shapes, last, qk_norm=True):
    """The block, its variables and the shared vectors of a recorded time, by diffusers' weights."""
    tensors = drawn_again(names_and_shapes)
    steer = {leaf: tensors.pop(f"norm1.linear.{leaf}") for leaf in ("weight", "bias")}
    tensors = {name: value for name, value in tensors.items() if not name.startswith("norm1_context")}
    tensors = without_silent_text(tensors) if last else tensors
    rows = attention_rows("attn", "mixer") + ffn_rows("ff", "image_ffn")
    rows += [] if last else ffn_rows("ff_context", "text_ffn")
    rows = [row for row in rows if row[0] in tensors]
    tree = translated(tensors, rows, h=HEADS)
    # Nothing of its own: norms without scale and bias, and what adaLN-Zero makes of the time as it is.
    for stream in ("image",) if last else ("image", "text"):
        tree[f"{stream}_affine"] = dict(scale=jnp.zeros((6, WIDTH)), bias=jnp.zeros((6, WIDTH)))
    for stream in ("image", "text"):
        tree[f"{stream}_norm"] = dict(scale=jnp.ones(WIDTH), bias=jnp.zeros(WIDTH))
    block = JointBlock(JointAttention(HEADS, qk_norm, answers_text=not last), ratio=4.0, mixer_epsilon=1e-6)

    def shared(time):
        c = np.asarray(jax.nn.silu(time)) @ steer["weight"].T + steer["bias"]
        return jnp.asarray(c.reshape(-1, 6, WIDTH))

    return block, {"params": tree}, shared


@pytest.mark.parametrize("form", ["inner", "last"])
def test_with_full_attention_it_is_the_block_of_stable_diffusion_3(form):
    with np.load(FOLDER / "sd3_joint_block.npz") as data:
        held = dict(data)
    block, variables, shared = sd3(held[f"{form}_shapes"], form == "last")
    streams = jnp.asarray(held["image"]), jnp.asarray(held["text"])
    c = shared(held["time"])
    shapes = meta.unbox(jax.eval_shape(block.init, jax.random.key(0), streams, None, c))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    (image, text), _ = jax.jit(block.apply)(variables, streams, None, c)
    for ours, theirs in ((image, "image"), (text, "text")):
        if ours is None:
            assert form == "last"
            continue
        expected = held[f"{form}_{theirs}"]
        assert np.abs(ours - expected).max() <= 1e-5 * np.abs(expected).max()


def test_affine_without_a_scale_is_the_table_of_adaln_single():
    draw = np.random.default_rng(0)
    table, c = (jnp.asarray(draw.normal(size=s), jnp.float32) for s in ((6, WIDTH), (3, 6, WIDTH)))
    held = {"params": {"scale": jnp.zeros((6, WIDTH)), "bias": table}}
    single = AdaLNAffine().apply(held, c)
    np.testing.assert_array_equal(np.stack(single, axis=1), table[None] + c)
    held["params"]["bias"] = jnp.zeros((6, WIDTH))
    np.testing.assert_array_equal(np.stack(AdaLNAffine().apply(held, c), axis=1), c)


def test_affine_starts_as_the_published_code_does():
    made = meta.unbox(AdaLNAffine().init(jax.random.key(0), jnp.zeros((1, 6, 400))))["params"]
    assert {name: leaf.shape for name, leaf in made.items()} == {"scale": (6, 400), "bias": (6, 400)}
    for leaf in made.values():
        assert np.std(leaf) == pytest.approx(400**-0.5, rel=0.05)
