"""Experts that are sent their tokens: on one device the mixture as it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.errors import UsageError
from effjax.ffn import ExchangedMixture, Mixture
from effjax.ffn.routing import ranks

X = jax.random.normal(jax.random.key(0), (2, 12, 6))
FIELDS = dict(experts=5, chosen=2, hidden=7)


def both(**fields):
    """A mixture, the same with its tokens sent, and variables for both."""
    plain = Mixture(**FIELDS, **fields)
    variables = meta.unbox(jax.jit(plain.init)(jax.random.key(1), X))
    draw = np.random.default_rng(2)
    variables = jax.tree.map(lambda leaf: jnp.float32(draw.normal(size=leaf.shape)), variables)
    return plain, ExchangedMixture(**FIELDS, **fields), variables


def and_gradients(module, variables, x):
    def loss(variables, x):
        y = module.apply(variables, x)
        return jnp.sum(jnp.sin(y)), y

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(variables, x)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"gated": False, "use_bias": True, "shared": 4, "normalised": False},
        {"capacity": 0.6},
        {"capacity": 0.6, "priority": "score"},
        {"balance": 0.1, "scores": "sigmoid", "scale": 2.0},
    ],
    ids=["plain", "biases and a shared one", "capacity", "capacity by score", "sigmoid"],
)
def test_on_one_device_it_is_the_mixture(fields):
    plain, sent, variables = both(**fields)
    expected, found = (and_gradients(module, variables, X) for module in (plain, sent))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_who_finds_no_room_is_dropped_last_come_first():
    _, sent, variables = both(normalised=False)
    same = jnp.broadcast_to(X[:1, :1], X.shape)  # all tokens want the same two experts
    y = jax.jit(sent.clone(room=0.5).apply)(variables, same).reshape(24, 6)
    assert np.abs(y[:5]).min() > 0  # ceil(2 x 0.5 x 24 / 5) places
    np.testing.assert_allclose(y[:5], np.broadcast_to(y[:1], (5, 6)), rtol=1e-5)
    assert not np.any(y[5:])


def test_ranks_are_places_in_the_queue_of_each_expert():
    index = jnp.array([[0, 1], [1, 0], [0, 2], [3, 0]])  # 3 is nobody
    found = jax.jit(ranks, static_argnums=1)(index, 3)
    # Of expert 0: first choices of tokens 0 and 2, then second ones of tokens 1 and 3.
    assert found[:, 0].tolist()[:3] == [0, 0, 1]
    assert found[:, 1].tolist() == [1, 2, 0, 3]
    last_first = jax.jit(ranks, static_argnums=1)(index, 3, jnp.arange(4.0))
    assert last_first[:, 1].tolist() == [1, 3, 0, 2]
    assert last_first[:3, 0].tolist() == [1, 0, 0]


def test_the_routes_are_there_for_who_asks():
    plain, sent, variables = both(capacity=0.6)
    routes = [
        jax.jit(lambda v, module=module: module.apply(v, X, mutable="intermediates")[1])(variables)
        for module in (plain, sent)
    ]
    assert jax.tree.all(jax.tree.map(jnp.array_equal, *routes))


def test_what_it_cannot_is_refused():
    with pytest.raises(UsageError, match="kind 'mixture'"):
        ExchangedMixture(5, 2, 7, choice="expert")
    with pytest.raises(UsageError, match="drops every token"):
        ExchangedMixture(5, 2, 7, room=0.0)
