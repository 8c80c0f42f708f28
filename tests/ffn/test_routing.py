"""Sparse dispatch against GShard's dense one, with what is dropped and gradients; experts that choose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.errors import UsageError
from effjax.ffn import MLP, Mixture
from effjax.ffn.routing import by_experts, by_tokens, capacity, choose, needed
from effjax.measure.cost import count

T, C, E, F = 24, 6, 5, 7
X = jax.random.normal(jax.random.key(0), (2, T // 2, C))


def made(**fields):
    mixture = Mixture(**{**dict(experts=E, chosen=2, hidden=F), **fields})
    shapes = meta.unbox(jax.eval_shape(mixture.init, jax.random.key(1), X))
    draw = np.random.default_rng(2)
    return mixture, jax.tree.map(lambda leaf: jnp.float32(draw.normal(size=leaf.shape)), shapes)


def gshard(mixture, params, x):
    """The layer as one-hot tensors [T, E, C] and einsums over them."""
    p, tokens = params["params"], x.reshape(-1, C)
    logits = tokens @ p["router"]["kernel"]
    scores = jax.nn.softmax(logits)
    weights, index = jax.lax.top_k(scores, mixture.chosen)
    if mixture.normalised:
        weights = weights / jnp.sum(weights, -1, keepdims=True)
    places = int(np.ceil(mixture.chosen * mixture.capacity * T / mixture.experts))
    served = jnp.arange(T) if mixture.priority == "place" else jnp.argsort(-scores.max(-1))
    combine = dispatch = jnp.zeros((T, mixture.experts, places))
    before = jnp.zeros((mixture.experts,), jnp.int32)
    for k in range(mixture.chosen):
        mask = jax.nn.one_hot(index[served, k], mixture.experts, dtype=jnp.int32)  # [T, E]
        place = jnp.cumsum(mask, 0) - mask + before[None]
        before = before + mask.sum(0)
        taken = mask[:, :, None] * jax.nn.one_hot(place, places)  # none where place >= C
        dispatch = dispatch.at[served].add(taken)
        combine = combine.at[served].add(taken * weights[served, k][:, None, None])
    rows = jnp.einsum("tec,td->ecd", dispatch, tokens)
    h = jax.nn.silu(jnp.einsum("ecd,edf->ecf", rows, p["gate_kernel"]))
    h = h * jnp.einsum("ecd,edf->ecf", rows, p["expand_kernel"])
    y = jnp.einsum("tec,ecd->td", combine, jnp.einsum("ecf,efd->ecd", h, p["contract_kernel"]))
    return y.reshape(x.shape), dispatch


@pytest.mark.parametrize("priority", ["place", "score"])
@pytest.mark.parametrize(("chosen", "factor"), [(1, 0.5), (2, 1.0), (3, 0.8), (5, 0.4)])
def test_dense_dispatch_is_matched_with_gradients(chosen, factor, priority):
    mixture, params = made(chosen=chosen, capacity=factor, priority=priority, normalised=chosen > 1)
    g = jax.random.normal(jax.random.key(5), X.shape)

    @jax.jit
    def both(params, x):
        dense = jax.vjp(lambda *args: gshard(mixture, *args), params, x, has_aux=True)
        sparse = jax.vjp(
            lambda *args: mixture.apply(*args, mutable=["intermediates"]), params, x, has_aux=True
        )
        return [(y, aux, pull(g)) for y, pull, aux in (dense, sparse)]

    (wanted, dispatch, dense), (y, sown, sparse) = both(params, X)
    (routes,) = sown["intermediates"]["routes"]
    full = np.asarray(routes.expert) < E
    pairs = set(zip(np.asarray(routes.token)[full], np.asarray(routes.expert)[full], strict=True))
    assert pairs == set(zip(*np.nonzero(np.asarray(dispatch).sum(-1)), strict=True))
    assert len(pairs) < T * chosen  # somebody is dropped
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
    for a, b in zip(jax.tree.leaves(sparse), jax.tree.leaves(dense), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_the_first_come_is_served_first_or_the_best():
    index, weights = jnp.zeros((4, 1), jnp.int32), jnp.array([[0.1], [0.4], [0.3], [0.2]])
    in_order = by_tokens(weights, index, 2, 2)
    np.testing.assert_array_equal(in_order.token[:2], [0, 1])
    np.testing.assert_array_equal(in_order.sizes, [2, 0])
    best = by_tokens(weights, index, 2, 2, weights[:, 0])
    np.testing.assert_array_equal(best.token[:2], [1, 2])
    # Places that nobody takes are rows without a token and without a weight.
    np.testing.assert_array_equal(best.token[2:], 4)
    np.testing.assert_array_equal(best.weight[2:], 0)


def test_second_choices_wait_for_all_first_ones():
    index = jnp.array([[1, 0], [0, 1], [0, 1]])
    routes = by_tokens(jnp.ones((3, 2)), index, 2, 2)
    np.testing.assert_array_equal(routes.token, [1, 2, 0, 1])
    np.testing.assert_array_equal(routes.sizes, [2, 2])


def test_the_least_capacity_that_drops_nothing():
    """Tutel's policy 0; a bound below it drops as many as exceed it, one above it costs and drops nothing."""
    logits = jax.random.normal(jax.random.key(7), (T, E))
    weights, index = choose(logits, 2, True)
    load = np.bincount(np.asarray(index).ravel(), minlength=E)
    factor = float(needed(index, E))
    least = capacity(factor - 1e-5, T, 2, E)
    assert least == load.max() > 2 * T / E
    for limit in (None, least, least + 3, least - 2):
        sizes = by_tokens(weights, index, E, limit).sizes
        assert sizes.sum() == (np.minimum(load, limit).sum() if limit == least - 2 else 2 * T)


def test_dropped_tokens_get_nothing_and_give_nothing():
    mixture, params = made(chosen=1, capacity=0.2)
    y, sown = jax.jit(lambda params: mixture.apply(params, X, mutable=["intermediates"]))(params)
    (routes,) = sown["intermediates"]["routes"]
    dropped = np.setdiff1d(np.arange(T), routes.token)
    assert len(dropped) >= T - E
    np.testing.assert_array_equal(y.reshape(T, C)[dropped], 0.0)
    slope = jax.jit(jax.grad(lambda x: jnp.sum(mixture.apply(params, x) ** 2)))(X).reshape(T, C)
    np.testing.assert_array_equal(slope[dropped], 0.0)


def test_evaluation_may_drop_nobody():
    mixture, params = made(capacity=0.3, eval_capacity=E / 2)
    apply = jax.jit(lambda mixture, train: mixture.apply(params, X, train=train), static_argnums=(0, 1))
    free = apply(mixture.clone(capacity=None, eval_capacity=None), False)
    np.testing.assert_allclose(apply(mixture, False), free, rtol=1e-6)
    assert np.abs(apply(mixture, True) - free).max() > 1e-2


def test_identical_experts_that_all_take_part_are_one():
    mixture, params = made(chosen=E, gated=False, activation="gelu", use_bias=False)
    p = jax.tree.map(lambda leaf: leaf, params["params"])
    for name in ("expand_kernel", "contract_kernel"):
        p[name] = jnp.broadcast_to(p[name][:1], p[name].shape)
    dense = {"params": {n: {"kernel": p[f"{n}_kernel"][0]} for n in ("expand", "contract")}}
    wanted = MLP(F, use_bias=False).apply(dense, X)
    np.testing.assert_allclose(jax.jit(mixture.apply)({"params": p}, X), wanted, rtol=1e-4, atol=1e-5)


def test_dispatch_costs_no_products():
    """O(T k d) copies, where einsums over [T, E, C] are O(T E C d) multiply-accumulates."""
    mixture, params = made(capacity=1.0)
    rows = E * capacity(1.0, T, 2, E)
    sparse = count(mixture.apply, params, X)
    assert sparse.macs == T * C * E + min(rows, 2 * T) * 3 * C * F
    dense = count(lambda *args: gshard(mixture, *args)[0], params, X)
    assert dense.macs == T * C * E + rows * 3 * C * F + 2 * T * rows * C


@pytest.mark.parametrize("normalised", [False, True])
def test_experts_take_their_best_tokens(normalised):
    mixture, params = made(choice="expert", capacity=1.2, normalised=normalised)
    y = jax.jit(mixture.apply)(params, X).reshape(T, C)
    p, tokens = jax.tree.map(np.asarray, params["params"]), np.asarray(X).reshape(T, C)
    scores = np.asarray(jax.nn.softmax(tokens @ p["router"]["kernel"]))
    taken, wanted, total = int(np.ceil(2 * 1.2 * T / E)), np.zeros((T, C)), np.zeros(T)
    for e in range(E):
        for t in np.argsort(-scores[:, e])[:taken]:
            gate, value = tokens[t] @ p["gate_kernel"][e], tokens[t] @ p["expand_kernel"][e]
            wanted[t] += scores[t, e] * (gate / (1 + np.exp(-gate)) * value) @ p["contract_kernel"][e]
            total[t] += scores[t, e]
    if normalised:
        wanted /= np.maximum(total, 1e-9)[:, None]
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-4)
    routes = by_experts(jnp.asarray(scores), taken, False)
    np.testing.assert_array_equal(routes.sizes, taken)


REFUSED = {
    "drops every token": dict(capacity=0.0),
    "capacity=-1.25 drops every token": dict(capacity=-1.25),
    "capacity=nan drops every token": dict(eval_capacity=float("nan")),
    "chosen=6 of experts=5": dict(chosen=6),
    "needs a capacity": dict(priority="score"),
    "are used evenly": dict(choice="expert", balance=0.01),
    "more tokens than there are": dict(choice="expert", chosen=4, capacity=1.5),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_is_refused(message):
    with pytest.raises(UsageError, match=message):
        Mixture(**{**dict(experts=E, chosen=2, hidden=F), **REFUSED[message]})
