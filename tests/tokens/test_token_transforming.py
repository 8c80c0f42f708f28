import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.config import build_kind
from effjax.errors import UsageError
from effjax.mixers.stats import Stats
from effjax.models import KINDS
from effjax.tokens import ClassAttention, PiToMe, Tokens, TokenTransforming, ToMe
from effjax.tokens.assignment import Mixture, apply
from effjax.tokens.bipartite import normalised
from effjax.tokens.point import Where
from effjax.tokens.token_transforming import matrix, transformation

HERE = Where(0, 3)


def bag(sizes=False):
    """Patches behind a class token, of different sizes or of one."""
    x = jax.random.normal(jax.random.key(0), (2, 13, 6))
    tokens = Tokens.of(x, ends=(1, 0))
    if not sizes:
        return tokens
    return dataclasses.replace(tokens, size=1.0 + jax.random.randint(jax.random.key(1), (2, 13), 0, 4))


def stats(tokens):
    n = tokens.x.shape[1]
    logits = jax.random.normal(jax.random.key(2), (2, 3, n, n))
    keys = jax.random.normal(jax.random.key(3), (2, n, 3, 4))
    return Stats(tokens.x, keys=keys, attention=jax.nn.softmax(logits))


@pytest.mark.parametrize("method", [ClassAttention(keep=0.6), ToMe(remove=5), PiToMe(remove=4)])
def test_every_method_is_a_matrix(method):
    tokens = bag(sizes=True)
    plan = method.plan(tokens, stats(tokens), HERE)
    weights = np.asarray(matrix(plan, tokens))
    expected = apply(plan, tokens, False)
    np.testing.assert_allclose(weights @ tokens.x[:, 1:], expected.x[:, 1:], atol=1e-5)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    as_mixture = apply(Mixture(jnp.asarray(weights), expected.size[:, 1:]), tokens, False)
    np.testing.assert_allclose(as_mixture.x, expected.x, atol=1e-5)
    np.testing.assert_array_equal(as_mixture.size, expected.size)
    entries = (weights > 0).sum(1)  # of each column
    assert entries.max() == 1, "no token goes to two places"
    assert (entries.min() == 0) == isinstance(method, ClassAttention)


def test_it_divides_tokens_among_anchors():
    tokens = bag(sizes=True)
    told = stats(tokens)
    plan = TokenTransforming(remove=5, temperature=0.2).plan(tokens, told, HERE)
    seen = np.asarray(told.attention, np.float64).mean((1, 2))
    keys = np.asarray(normalised(told.keys.mean(2)), np.float64)[:, 1:]
    for b in range(2):
        anchors = sorted(np.argsort(-seen[b, 1:], kind="stable")[:7])
        divided = np.exp(keys[b][anchors] @ keys[b].T / 0.2)
        divided /= divided.sum(0)
        mass = divided * np.asarray(tokens.size)[b, 1:]
        np.testing.assert_allclose(plan.weights[b], mass / mass.sum(1, keepdims=True), rtol=1e-4)
        np.testing.assert_allclose(plan.sizes[b], mass.sum(1), rtol=1e-4)
        np.testing.assert_allclose(plan.back[b], divided.T, rtol=1e-4)
    assert matrix(plan, tokens) is plan.weights
    assert (np.asarray(plan.weights) > 0).all(), "many to many"


def test_rows_sum_to_one_and_sizes_to_what_they_were():
    tokens = bag(sizes=True)
    plan = TokenTransforming(keep=0.5).plan(tokens, stats(tokens), HERE)
    after = apply(plan, tokens, True)
    np.testing.assert_allclose(plan.weights.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(after.size.sum(1), tokens.size.sum(1), rtol=1e-5)
    even = dataclasses.replace(tokens, x=jnp.full_like(tokens.x, 3.0))
    np.testing.assert_allclose(apply(plan, even, True).x, 3.0, rtol=1e-5)


def test_sharp_it_merges_and_with_all_anchors_it_is_the_identity():
    tokens = bag(sizes=True)
    told = stats(tokens)
    keys = normalised(told.keys.mean(2))[:, 1:]
    similarity = keys @ keys.swapaxes(1, 2)
    sizes = tokens.size[:, 1:]
    weights, new, back = transformation(similarity, sizes, 1e-3)
    np.testing.assert_allclose(weights, np.broadcast_to(np.eye(12), (2, 12, 12)), atol=1e-6)
    np.testing.assert_allclose(new, sizes, rtol=1e-6)
    np.testing.assert_allclose(back, weights, atol=1e-6)
    sharp = TokenTransforming(remove=5, temperature=1e-4).plan(tokens, told, HERE)
    entries = np.asarray(sharp.weights) > 1e-6
    np.testing.assert_array_equal(entries.sum(1), 1)


def test_dense_outputs_are_made_of_the_anchors():
    tokens = bag()
    plan = TokenTransforming(keep=0.5, temperature=0.3).plan(tokens, stats(tokens), HERE)
    restored = apply(plan, tokens, True).restored()
    expected = np.asarray(plan.back) @ np.asarray(plan.weights) @ np.asarray(tokens.x)[:, 1:]
    np.testing.assert_allclose(restored.x[:, 1:], expected, atol=1e-5)
    np.testing.assert_array_equal(restored.x[:, 0], tokens.x[:, 0])
    even = dataclasses.replace(tokens, x=jnp.full_like(tokens.x, 3.0))
    np.testing.assert_allclose(apply(plan, even, True).restored().x, 3.0, rtol=1e-5)


def test_it_runs_in_a_vit_and_has_gradients():
    block = dict(mixer=dict(kind="attention", heads=2), ffn=dict(kind="mlp"))
    section = dict(kind="vit", patch=4, dim=8, depth=2, classes=3, block=block, pool="mean")
    model = build_kind(KINDS, section, "model")
    images = jax.random.normal(jax.random.key(4), (2, 16, 16, 3))
    variables = meta.unbox(model.init(jax.random.key(5), images))
    variables["params"]["head"]["kernel"] = jax.random.normal(jax.random.key(6), (8, 3))
    fast = model.clone(reduce=TokenTransforming(keep=0.7))
    same = model.clone(reduce=TokenTransforming(keep=1.0))
    np.testing.assert_allclose(same.apply(variables, images), model.apply(variables, images), atol=1e-6)
    gradient = jax.jit(jax.grad(lambda v: jnp.sum(fast.apply(v, images) ** 2)))(variables)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(gradient))


def test_bad_input():
    with pytest.raises(UsageError, match="temperature=0 must be positive"):
        TokenTransforming(keep=0.5, temperature=0.0)
    with pytest.raises(UsageError, match="say either keep"):
        TokenTransforming()
