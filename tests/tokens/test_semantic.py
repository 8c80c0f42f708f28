"""Semantic tokens: the published layer, and what a generator and its recovery promise."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.errors import UsageError
from effjax.layers.stack import streams
from effjax.measure.cost import count
from effjax.tokens import Recover, Schedule, Semantic, Slimming, Tokens
from effjax.tokens.semantic import CrossLayer, max_pool
from tests.models.official import translated
from tests.tokens.tiny import images, vit

IMAGES = images()


def drawn(model, x):
    """All parameters at random."""
    held = meta.unbox(jax.jit(functools.partial(model.init, train=False))(jax.random.key(1), x))["params"]
    leaves, tree = jax.tree.flatten(held)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [leaf + 0.3 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved)


@pytest.fixture(scope="module")
def recorded():
    with np.load(Path(__file__).parent / "fixtures" / "stvit.npz") as data:
        return {name: data[name].astype(np.float32) for name in data.files}


def test_the_layer_is_the_published_one(recorded):
    norm = [("weight", "scale"), ("bias", "bias")]
    linear = [("weight", "kernel", "o i -> i o"), ("bias", "bias", None)]
    heads = [("weight", "kernel", "(h d) i -> i h d"), ("bias", "bias", "(h d) -> h d")]
    rows = [(f"norm1.{a}", f"mixer_norm/{b}", None) for a, b in norm]
    rows += [(f"norm2.{a}", f"ffn_norm/{b}", None) for a, b in norm]
    rows += [(f"attn.q.{a}", f"query/{b}", c) for a, b, c in heads]
    rows += [(f"attn.kv.{a}", (f"key/{b}", f"value/{b}"), c) for a, b, c in heads]
    rows += [
        ("attn.proj.weight", "output/kernel", "o (h d) -> h d o"),
        ("attn.proj.bias", "output/bias", None),
    ]
    for a, b in (("fc1", "expand"), ("fc2", "contract")):
        rows += [(f"mlp.{a}.{c}", f"ffn/{b}/{d}", e) for c, d, e in linear]
    rows += [("layer_scale_1", "mixer_scale", None), ("layer_scale_2", "ffn_scale", None)]
    theirs = {name[2:]: value for name, value in recorded.items() if name.startswith("w/")}
    params = translated(theirs, rows, h=2, d=8)
    layer = CrossLayer(heads=2, epsilon=1e-5, layer_scale=1.0)
    q, x = jnp.asarray(recorded["q"]), jnp.asarray(recorded["x"])
    wanted = meta.unbox(jax.eval_shape(layer.init, jax.random.key(0), q, x))["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, wanted)
    y, weights = jax.jit(layer.apply)({"params": params}, q, x)
    np.testing.assert_allclose(y, recorded["y"], atol=1e-5 * np.abs(recorded["y"]).max())
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)
    order = np.random.RandomState(0).permutation(10)  # the order of what is looked at makes no difference
    np.testing.assert_allclose(layer.apply({"params": params}, q, x[:, order])[0], y, atol=1e-5)


@pytest.mark.parametrize("name", ["even", "odd"])
def test_pooling_is_torchs_adaptive_one(recorded, name):
    pooled = recorded[f"pooled_{name}"]
    np.testing.assert_array_equal(max_pool(jnp.asarray(recorded[f"map_{name}"]), pooled.shape[1:3]), pooled)


def test_as_many_windows_as_places_pool_nothing():
    grid = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    np.testing.assert_array_equal(max_pool(grid, (4, 4)), grid)


def test_generator_of_silent_layers_returns_pooled_tokens_and_centres():
    model = Semantic(side=2, heads=2, layer_scale=0.0)
    bag = Tokens.of(jax.random.normal(jax.random.key(0), (2, 17, 8)), (1, 0), grid=(4, 4))
    params = meta.unbox(jax.jit(functools.partial(model.init, train=False))(jax.random.key(1), bag))["params"]
    made = jax.jit(lambda p, bag: model.apply({"params": p}, bag, False))(params, bag)
    pooled = max_pool(bag.x[:, 1:].reshape(2, 4, 4, 8), (2, 2)).reshape(2, 4, 8) + params["centres"][None]
    np.testing.assert_allclose(made.x[:, 1:], pooled, atol=1e-6)
    np.testing.assert_array_equal(made.x[:, :1], bag.x[:, :1])
    np.testing.assert_allclose(made.size.sum(1), 17, rtol=1e-6)
    assert not made.whole
    assert made.origin.shape == (2, 17)
    assert set(np.unique(made.origin[:, 1:])) <= {1, 2, 3, 4}


def test_a_flat_region_is_looked_at_evenly_and_belongs_to_one_centre():
    colours = jax.random.normal(jax.random.key(3), (2, 3, 8))
    region = jnp.array([0, 0, 1, 1] * 2 + [2, 2, 1, 1] * 2)
    bag = Tokens.of(colours[:, region], grid=(4, 4))
    model = Semantic(side=2, heads=2)
    made = model.apply({"params": drawn(model, bag)}, bag, False)
    for part in range(3):
        places = np.asarray(made.origin)[:, region == part]
        assert (places == places[:, :1]).all()


DUMBBELLS = {1: Semantic(side=2, heads=2, recoverable=True), 3: Recover(heads=2), 4: Slimming(3)}


@pytest.fixture(scope="module")
def dumbbell():
    model = vit(reduce=Schedule(DUMBBELLS), pool="mean")
    return model, drawn(model, IMAGES)


def test_recovery_gives_every_image_token_back_and_others_may_follow(dumbbell):
    model, params = dumbbell
    _, sown = jax.jit(lambda p, x: model.apply({"params": p}, x, mutable=["intermediates"]))(params, IMAGES)
    bags = streams(sown["intermediates"]["blocks"])
    assert [bag.x.shape[1] for bag in bags] == [16, 4, 4, 16, 3]
    layer = params["reduce_3"]["layer"]
    wanted, _ = CrossLayer(heads=2).apply(
        {"params": layer}, bags[1].carried, bags_before_recovery(model, params)
    )
    np.testing.assert_allclose(bags[3].x, wanted, atol=1e-4)


def bags_before_recovery(model, params):
    """What left the second block."""
    short = model.clone(reduce=Schedule({1: DUMBBELLS[1]}))
    _, sown = jax.jit(lambda p, x: short.apply({"params": p}, x, mutable=["intermediates"]))(params, IMAGES)
    return streams(sown["intermediates"]["blocks"])[3].x


@pytest.mark.slow
def test_gradients_reach_everything_and_are_those_of_finite_differences(dumbbell):
    model, params = dumbbell
    target = jax.random.normal(jax.random.key(4), (2, 5))

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        return jnp.mean((model.apply({"params": params}, IMAGES) - target) ** 2)

    _, gradient = loss(params)
    assert all(bool(jnp.any(leaf)) for leaf in jax.tree.leaves(gradient))
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient)))
    step = 1e-2 / norm
    ahead, behind = (
        loss(jax.tree.map(lambda p, g, s=s: p + s * step * g / norm, params, gradient))[0] for s in (1, -1)
    )
    np.testing.assert_allclose((ahead - behind) / (2 * step), norm, rtol=2e-2)


def test_macs_are_those_of_the_formula():
    model = vit(reduce=Schedule({2: Semantic(side=2, heads=2)}), pool="mean")
    held = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), IMAGES[:1]))["params"]
    c, n, m = 16, 16, 4

    def layer(n):  # projections, a perceptron of twice the width, attention
        return n * 8 * c * c + 2 * n * n * c

    generating = 2 * (m * 10 * c * c + (m + n) * 2 * c * c + 2 * m * (m + n) * c)
    ends = n * 4 * c + c * 5
    found = count(lambda p, x: model.apply({"params": p}, x), held, IMAGES[:1]).macs
    assert found == ends + 2 * layer(n) + generating + 2 * layer(m)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({1: Slimming(4), 2: Semantic(side=2, heads=2)}, "put them before other reductions"),
        ({1: Recover(heads=2)}, "recoverable=True"),
        ({1: Semantic(side=5, heads=2)}, "4 x 4 tokens has no 5 x 5 windows"),
        ({1: Semantic(side=2, heads=3)}, "heads=3 does not divide the width 16"),
    ],
)
def test_schedules_that_cannot_be(entries, message):
    with pytest.raises(UsageError, match=message):
        jax.eval_shape(vit(reduce=Schedule(entries), pool="mean").init, jax.random.key(0), IMAGES)
