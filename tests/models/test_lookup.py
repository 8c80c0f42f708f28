"""LookupViT: one score matrix for both directions, and a network that works at any number of tokens."""

import itertools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.errors import UsageError
from effjax.ffn import MLP
from effjax.measure.cost import count
from effjax.mixers import Attention
from effjax.mixers.context import Context
from effjax.models import LookupViT, ViT
from effjax.models.blocks.lookup import LookupBlock
from effjax.models.blocks.metaformer import Block

C, H = 16, 2
BLOCK = LookupBlock(H, Attention(H), MLP(), MLP(ratio=0.5))
P, FINE = (jax.random.normal(jax.random.key(i), (2, n, C)) for i, n in ((0, 4), (1, 9)))
IMAGES = jax.random.normal(jax.random.key(2), (3, 8, 8, 1))
MODEL = LookupViT(BLOCK, side=3, patch=2, dim=C, depth=2, classes=5)


def moved(params):
    """Parameters away from their initial values."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    return jax.tree.unflatten(
        tree, [leaf + 0.3 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)]
    )


@pytest.fixture(scope="module")
def params():
    init = jax.jit(lambda: BLOCK.init(jax.random.key(4), (P, FINE), jnp.float32(0), Context()))
    return moved(meta.unbox(init())["params"])


@jax.jit
def run(params, p, fine):
    return BLOCK.apply({"params": params}, (p, fine), jnp.float32(0), Context())[0]


@pytest.fixture(scope="module")
def held():
    return moved(meta.unbox(jax.jit(MODEL.init)(jax.random.key(5), IMAGES))["params"])


def test_equals_the_equations_in_float64_as_loops(params):
    w = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def norm(x, name):
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(var + 1e-6) * w[name]["scale"] + w[name]["bias"]

    def heads(x, name):
        return np.einsum("nc,chd->hnd", x, w[name]["kernel"]) + w[name]["bias"][:, None]

    def out(y, name):
        return np.einsum("hnd,hdc->nc", y, w[name]["kernel"]) + w[name]["bias"]

    def soft(s):
        e = np.exp(s - s.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    def within(name, x):
        inputs = (jnp.asarray(x, jnp.float32)[None], *((Context(),) if name == "mixer" else ()))
        return np.asarray(getattr(BLOCK, name).apply({"params": params[name]}, *inputs)[0], np.float64)

    got_p, got_fine = run(params, P, FINE)
    for b in range(2):
        p, fine = np.asarray(P[b], np.float64), np.asarray(FINE[b], np.float64)
        q, k, v = (
            heads(norm(p, "gather_norm"), "query"),
            *(heads(norm(fine, "lookup_norm"), n) for n in ("key", "value")),
        )
        scores = np.einsum("hpd,hnd->hpn", q, k) / np.sqrt(C // H)
        p = p + out(np.einsum("hpn,hnd->hpd", soft(scores), v), "output")
        p = p + within("mixer", norm(p, "mixer_norm"))
        p = p + within("ffn", norm(p, "ffn_norm"))
        back = soft(scores.transpose(0, 2, 1))
        fine = fine + out(back @ heads(norm(p, "infuse_norm"), "infuse_value"), "infuse_output")
        fine = fine + within("light", norm(fine, "light_norm"))
        np.testing.assert_allclose(got_p[b], p, atol=2e-4)
        np.testing.assert_allclose(got_fine[b], fine, atol=2e-4)


def test_both_directions_share_one_product_of_scores(params):
    def dots(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                yield equation.outvars[0].aval.shape
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                yield from dots(inner)

    jaxpr = jax.make_jaxpr(lambda p: run.__wrapped__(p, P, FINE))(params)
    shapes = list(dots(jaxpr.jaxpr))
    both = {(2, H, 4, 9), (2, H, 9, 4)}
    assert sum(shape in both for shape in shapes) == 1
    assert (
        sum(shape == (2, H, 4, 4) for shape in shapes) == 1
    )  # those of the compressed tokens' own attention


def test_the_order_of_lookup_tokens_makes_no_difference_to_the_compressed(params):
    order = np.random.RandomState(0).permutation(9)
    p, fine = run(params, P, FINE)
    p_too, fine_too = run(params, P, FINE[:, order])
    np.testing.assert_allclose(p_too, p, atol=1e-5)
    np.testing.assert_allclose(fine_too, fine[:, order], atol=1e-5)


def test_without_gathering_and_as_many_tokens_it_is_a_vit(held):
    silent = dict(held["blocks"], output=jax.tree.map(jnp.zeros_like, held["blocks"]["output"]))
    names = "mixer", "ffn", "mixer_norm", "ffn_norm"
    vit = ViT(Block(Attention(H), MLP()), patch=2, dim=C, depth=2, classes=5, pool="mean")
    same = {name: held[name] for name in ("embed", "positions", "norm", "head")}
    wanted = jax.jit(vit.apply)({"params": same | {"blocks": {name: silent[name] for name in names}}}, IMAGES)
    full = MODEL.clone(side=4)
    logits = jax.jit(full.apply)({"params": held | {"blocks": silent}}, IMAGES)
    np.testing.assert_allclose(logits, wanted, atol=1e-4)
    gathering = jax.jit(full.apply)({"params": held}, IMAGES)
    assert np.abs(np.asarray(gathering - wanted)).max() > 1e-2


def test_the_same_parameters_work_at_any_number_of_tokens(held):
    outputs = []
    for side in (1, 2, 3, 4):
        model = MODEL.clone(side=side)
        shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), IMAGES))["params"]
        assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, held)
        outputs.append(jax.jit(model.apply)({"params": held}, IMAGES))
    assert all(np.abs(np.asarray(a - b)).max() > 1e-3 for a, b in itertools.pairwise(outputs))


def test_a_step_of_training_draws_one_of_the_grids(held):
    model = MODEL.clone(sides=(1, 2, 4))

    @jax.jit
    def loss(params, key):
        logits = model.apply({"params": params}, IMAGES, train=True, rngs={"dropout": key})
        return jnp.sum(logits**2), logits

    alone = [jax.jit(MODEL.clone(side=side).apply)({"params": held}, IMAGES) for side in (1, 2, 4)]
    seen = set()
    for seed in range(12):
        _, logits = loss(held, jax.random.key(seed))
        gaps = [np.abs(np.asarray(logits - one)).max() for one in alone]
        assert min(gaps) < 1e-4
        seen.add(int(np.argmin(gaps)))
    assert seen == {0, 1, 2}
    gradient = jax.jit(jax.grad(lambda p: loss(p, jax.random.key(0))[0]))(held)
    assert bool(jnp.any(gradient["blocks"]["query"]["kernel"]))
    evaluated = jax.jit(model.apply)({"params": held}, IMAGES)
    np.testing.assert_allclose(evaluated, jax.jit(MODEL.apply)({"params": held}, IMAGES), atol=1e-5)


def test_macs_are_those_of_the_formula(held):
    p, n, depth = 9, 16, 2
    heavy = 12 * p * C * C + 2 * p * p * C
    crossing = 2 * p * C * C + 2 * n * C * C + p * C * C + n * C * C + 3 * p * n * C
    light = n * C * C
    ends = n * 4 * C + C * 5 + (3 * 4 * 4 + 3 * 3 * 4) * C  # patches, head, and resizing 4 x 4 to 3 x 3
    found = count(lambda v, x: MODEL.apply({"params": v}, x), held, IMAGES[:1]).macs
    assert found == depth * (heavy + crossing + light) + ends


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(side=5), "5 x 5 compressed tokens is finer than the 4 x 4 patches"),
        (dict(sides=(2, 6)), "6 x 6 compressed tokens is finer"),
        (dict(block=BLOCK.clone(heads=3)), "heads=3 does not divide the width 16"),
    ],
)
def test_what_cannot_be(changes, message):
    with pytest.raises(UsageError, match=message):
        jax.eval_shape(MODEL.clone(**changes).init, jax.random.key(0), IMAGES)


def test_no_tokens_at_all():
    with pytest.raises(UsageError, match="0 x 0 compressed tokens has none"):
        MODEL.clone(side=0)


def test_a_picture_of_another_size(held):
    with pytest.raises(UsageError, match="position table holds 16 tokens"):
        MODEL.apply({"params": held}, jnp.zeros((1, 12, 12, 1)))
