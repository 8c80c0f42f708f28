"""Token slimming and its reverse, against the published code and their own promises."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from configs.vision.sit import lvvit, slimming
from effjax import models
from effjax.config import build_kind
from effjax.errors import UsageError
from effjax.layers.stack import streams
from effjax.measure.cost import count
from effjax.tokens import Schedule, Slimming, Tokens
from effjax.tokens.slimming import Recalibration
from tests.models.official import translated
from tests.tokens.tiny import images, vit

X = jax.random.normal(jax.random.key(0), (2, 13, 8))
BAG = Tokens.of(X, ends=(1, 0))
MODULE = Slimming(count=5)


def drawn(module, *inputs):
    """Parameters away from their initial values."""
    held = meta.unbox(jax.jit(module.init, static_argnums=[2])(jax.random.key(1), *inputs))["params"]
    leaves, tree = jax.tree.flatten(held)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return jax.tree.unflatten(
        tree, [leaf + 0.3 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)]
    )


@pytest.fixture(scope="module")
def held():
    return drawn(MODULE, BAG, False)


@jax.jit
def slim(params, bag=BAG):
    return MODULE.apply({"params": params}, bag, False)


def test_equals_the_equation_in_float64_as_loops(held):
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), held)
    erf = np.vectorize(math.erf)
    for row, made in zip(np.asarray(X, np.float64)[:, 1:], slim(held).x[:, 1:], strict=True):
        scores = np.zeros((12, 5))
        for n, token in enumerate(row):
            h = (token - token.mean()) / np.sqrt(token.var() + 1e-5) * p["norm"]["scale"] + p["norm"]["bias"]
            h = h @ p["hidden"]["kernel"] + p["hidden"]["bias"]
            h = h * (1 + erf(h / np.sqrt(2))) / 2
            scores[n] = p["scale"] * (h @ p["scores"]["kernel"] + p["scores"]["bias"])
        powers = np.exp(scores)
        np.testing.assert_allclose(made, (powers / powers.sum(0)).T @ row, atol=1e-5)


def test_a_constant_field_stays_what_it_is_and_the_size_is_kept(held):
    field = jnp.broadcast_to(X[:, :1], X.shape)
    made = slim(held, Tokens.of(field, ends=(1, 0)))
    np.testing.assert_allclose(made.x, field[:, :6], atol=1e-6)
    np.testing.assert_allclose(made.size.sum(1), 13.0, rtol=1e-6)
    np.testing.assert_array_equal(slim(held).x[:, 0], X[:, 0])  # the class token is left aside


def test_the_order_of_the_tokens_makes_no_difference(held):
    order = jnp.array([0, *np.random.RandomState(0).permutation(12) + 1])
    np.testing.assert_allclose(slim(held, Tokens.of(X[:, order], ends=(1, 0))).x, slim(held).x, atol=1e-6)


def test_at_a_low_temperature_tokens_are_selected(held):
    made = slim({**held, "scale": jnp.array(1e5)}).x[:, 1:]
    gap = jnp.abs(made[:, :, None] - X[:, None, 1:]).max(-1).min(-1)
    np.testing.assert_allclose(gap, 0, atol=1e-5)


def test_gradients_are_those_of_finite_differences(held):
    target = jax.random.normal(jax.random.key(3), (2, 6, 8))

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        return jnp.mean((slim(params).x - target) ** 2)

    _, gradient = loss(held)
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient)))
    assert all(bool(jnp.any(g)) for name, g in gradient.items() if name == "scale")
    ahead, behind = (
        loss(jax.tree.map(lambda p, g, s=s: p + s * g / norm, held, gradient))[0] for s in (1e-2, -1e-2)
    )
    np.testing.assert_allclose((ahead - behind) / 2e-2, norm, rtol=1e-2)


def test_macs_are_those_of_the_schedule():
    model = vit(reduce=Schedule({2: Slimming(4)}))
    held = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), images(1)))["params"]

    def macs(model, held):
        return count(lambda p, x: model.apply({"params": p}, x), held, images(1)).macs

    def layers(n, c=16):  # projections, FFN of twice the width, attention
        return n * (4 * c * c + 4 * c * c) + 2 * n * n * c

    slimming = 16 * (16 * 8 + 8 * 4) + 4 * 16 * 16  # scores, and averages
    whole = macs(vit(), {k: v for k, v in held.items() if k != "reduce_2"})
    assert macs(model, held) == whole - 2 * layers(17) + 2 * layers(5) + slimming


def test_more_tokens_than_there_are():
    with pytest.raises(UsageError, match="count=13 tokens: there are 12"):
        Slimming(13).init(jax.random.key(0), BAG, False)


@pytest.fixture(scope="module")
def published():
    """The published network, its toy's weights here, and what it computed."""
    with np.load(Path(__file__).parent / "fixtures" / "sit.npz") as data:
        recorded = {name: data[name].astype(np.float32) for name in data.files}
    theirs = {name[2:]: value for name, value in recorded.items() if name.startswith("w/")}
    norm = [("weight", "scale"), ("bias", "bias")]
    linear = [("weight", "kernel", "o i -> i o"), ("bias", "bias", None)]
    block = "blocks.{}", "params/blocks"
    rows = [
        ("cls_token", "params/class_token", "1 1 c -> 1 c"),
        ("pos_embed", "params/positions", "1 n c -> n c"),
    ]
    for i in range(4):
        at = f"patch_embed.{{}}{i + 1}", f"stem/layers_{i}"
        rows += [(f"{at[0].format('conv')}.weight", f"params/{at[1]}/conv/kernel", "o i u v -> u v i o")]
        rows += [(f"{at[0].format('bn')}.{a}", f"params/{at[1]}/norm/{b}", None) for a, b in norm]
        kept = ("running_mean", "mean"), ("running_var", "var")
        rows += [(f"{at[0].format('bn')}.{a}", f"batch_stats/{at[1]}/norm/{b}", None) for a, b in kept]
    for a, b in (("norm1", "mixer_norm"), ("norm2", "ffn_norm")):
        rows += [(f"{block[0]}.{a}.{c}", f"{block[1]}/{b}/{d}", None) for c, d in norm]
    attention = tuple(f"{block[1]}/mixer/{name}/kernel" for name in ("query", "key", "value"))
    rows += [(f"{block[0]}.attn.qkv.weight", attention, "(h d) i -> i h d")]
    rows += [(f"{block[0]}.attn.proj.weight", f"{block[1]}/mixer/output/kernel", "o (h d) -> h d o")]
    rows += [(f"{block[0]}.attn.proj.bias", f"{block[1]}/mixer/output/bias", None)]
    for a, b in (("fc1", "expand"), ("fc2", "contract")):
        rows += [(f"{block[0]}.mlp.{a}.{c}", f"{block[1]}/ffn/{b}/{d}", e) for c, d, e in linear]
    rows += [(f"norm.{a}", f"params/norm/{b}", None) for a, b in norm]
    rows += [(f"head.{a}", f"params/head/{b}", c) for a, b, c in linear]
    for i in range(3):
        rows += [(f"tsm.{i}.scale", f"params/reduce_{i + 1}/scale", "1 1 1 -> ")]
        rows += [(f"tsm.{i}.weight.0.{a}", f"params/reduce_{i + 1}/norm/{b}", None) for a, b in norm]
        for a, b in (("1", "hidden"), ("3", "scores")):
            rows += [(f"tsm.{i}.weight.{a}.{c}", f"params/reduce_{i + 1}/{b}/{d}", e) for c, d, e in linear]
    for i in range(4):
        at = f"rtsm.{i}", f"recalibration/{i}"
        for a, b in (("norm1", "token_norm"), ("norm2", "ffn_norm")):
            rows += [(f"{at[0]}.{a}.{c}", f"{at[1]}/{b}/{d}", None) for c, d in norm]
        for a, b in (
            ("1.fc1", "expand"),
            ("1.fc2", "contract"),
            ("2.fc1", "ffn/expand"),
            ("2.fc2", "ffn/contract"),
        ):
            rows += [(f"{at[0]}.mlp{a}.{c}", f"{at[1]}/{b}/{d}", e) for c, d, e in linear]
    section = lvvit(16, 4, 2) | slimming(16, (1, 2, 3)) | dict(classes=5)
    tree = translated(theirs, rows, h=2, d=8)
    return build_kind(models.KINDS, section, "model"), tree.pop("recalibration"), tree, recorded


def test_the_network_is_the_published_one(published):
    model, _, held, recorded = published
    pictures = jnp.asarray(recorded["x"].transpose(0, 2, 3, 1))
    wanted = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), pictures))
    assert jax.tree.map(jnp.shape, held) == jax.tree.map(jnp.shape, wanted)
    run = jax.jit(lambda v, x: model.apply(v, x, mutable=["intermediates"]))
    logits, sown = run(held, pictures)
    near = dict(atol=1e-4 * np.abs(recorded["logits"]).max())
    np.testing.assert_allclose(logits, recorded["logits"], **near)
    for i, bag in enumerate(streams(sown["intermediates"]["blocks"])[1:]):
        tokens = recorded[f"tokens_{i}"]
        np.testing.assert_allclose(bag.x[:, 1:], tokens, atol=1e-4 * np.abs(tokens).max())


def test_the_reverse_is_the_published_one(published):
    _, modules, _, recorded = published
    for i, params in modules.items():
        grown = Recalibration().apply({"params": params}, jnp.asarray(recorded[f"tokens_{i}"]), 16)
        wanted = recorded[f"grown_{i}"]
        np.testing.assert_allclose(grown, wanted, atol=1e-4 * np.abs(wanted).max())
