import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.errors import UsageError
from effjax.ffn import Gated, Mixture
from effjax.ffn.mixture import choose

X = jax.random.normal(jax.random.key(0), (2, 5, 8))


def made(**fields):
    mixture = Mixture(**{**dict(experts=5, chosen=2, hidden=12), **fields})
    shapes = meta.unbox(jax.eval_shape(mixture.init, jax.random.key(1), X))
    draw = np.random.default_rng(2)
    return mixture, jax.tree.map(lambda leaf: np.float32(draw.normal(size=leaf.shape)), shapes)


def by_hand(mixture, params, x):
    """Token by token, expert by expert."""
    p = params["params"]
    silu = lambda a: a / (1 + np.exp(-a))
    out = np.zeros_like(x)
    for at in np.ndindex(x.shape[:-1]):
        logits = x[at] @ p["router"]["kernel"]
        weights = np.exp(logits) / np.exp(logits).sum()
        best = np.argsort(-weights)[: mixture.chosen]
        total = weights[best].sum() if mixture.normalised else 1.0
        for e in best:
            h = silu(x[at] @ p["gate_kernel"][e]) * (x[at] @ p["expand_kernel"][e])
            out[at] += weights[e] / total * (h @ p["contract_kernel"][e])
        if mixture.shared:
            s = {name: p["shared"][name]["kernel"] for name in ("gate", "expand", "contract")}
            common = (silu(x[at] @ s["gate"]) * (x[at] @ s["expand"])) @ s["contract"]
            gate = 1 / (1 + np.exp(-x[at] @ p["shared_gate"]["kernel"])) if mixture.shared_gate else 1.0
            out[at] += gate * common
    return out


@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(normalised=False, chosen=3),
        dict(chosen=5),
        dict(shared=6),
        dict(shared=6, shared_gate=True),
    ],
)
def test_equals_the_equation(fields):
    mixture, params = made(**fields)
    y = jax.jit(mixture.apply)(params, X)
    np.testing.assert_allclose(y, by_hand(mixture, params, np.asarray(X)), rtol=1e-4, atol=1e-4)


def test_normalising_is_the_softmax_over_the_chosen_logits():
    logits = jax.random.normal(jax.random.key(3), (6, 5))
    weights, index = choose(logits, 2, normalised=True)
    chosen = jnp.take_along_axis(logits, index, axis=-1)
    np.testing.assert_allclose(weights, jax.nn.softmax(chosen, axis=-1), rtol=1e-5)


def test_one_expert_is_the_gated_perceptron():
    mixture, params = made(experts=1, chosen=1)
    p = params["params"]
    dense = {name: {"kernel": p[f"{name}_kernel"][0]} for name in ("gate", "expand", "contract")}
    np.testing.assert_allclose(
        mixture.apply(params, X), Gated(12).apply({"params": dense}, X), rtol=1e-5, atol=1e-5
    )


def test_gradients_are_right_and_reach_only_the_chosen():
    mixture, params = made(experts=40)
    loss = jax.jit(lambda params: jnp.sum(jnp.sin(mixture.apply(params, X))))
    gradient = jax.grad(loss)(params)["params"]
    chosen = np.unique(choose(X.reshape(-1, 8) @ params["params"]["router"]["kernel"], 2, True)[1])
    reached = np.flatnonzero(np.abs(gradient["gate_kernel"]).sum((1, 2)))
    np.testing.assert_array_equal(reached, chosen)
    draw = np.random.default_rng(5)
    way = jax.tree.map(lambda leaf: np.float32(draw.normal(size=leaf.shape)), params)
    step = 1e-3
    moved = [
        float(loss(jax.tree.map(lambda leaf, w, s=s: leaf + s * step * w, params, way))) for s in (1, -1)
    ]
    slope = sum(jnp.vdot(g, w) for g, w in zip(*map(jax.tree.leaves, (gradient, way["params"])), strict=True))
    assert (moved[0] - moved[1]) / (2 * step) == pytest.approx(float(slope), rel=2e-2)


def test_experts_are_an_axis_with_a_name_and_start_alike():
    boxed = Mixture(5, 2, 12).init(jax.random.key(1), X)["params"]
    assert boxed["gate_kernel"].names == ("expert", "embed", "expert_mlp")
    assert boxed["contract_kernel"].names == ("expert", "expert_mlp", "embed")
    assert boxed["router"]["kernel"].names == ("embed", "expert")
    bound = np.sqrt(6 / (8 + 12))  # of one expert's matrix, not of the stack
    kernel = np.abs(boxed["gate_kernel"].value)
    assert 0.9 * bound < kernel.max() <= bound


def test_computes_in_the_dtype_of_its_parameters_and_refuses_too_many():
    mixture, params = made()
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    assert mixture.apply(half, X.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    with pytest.raises(UsageError, match="chosen=6 of experts=5"):
        Mixture(5, 6, 12).init(jax.random.key(0), X)
