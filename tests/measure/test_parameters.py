"""Parameters that train, and parameters that one token of a mixture uses, against closed forms."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax import lax

from effjax.errors import UsageError
from effjax.measure import count

EXPERTS, TOP, TOKENS, DIM, HIDDEN, DEPTH = 8, 2, 48, 16, 24, 3
f32 = jnp.float32
X = jax.ShapeDtypeStruct((TOKENS, DIM), f32)


def boxed(names, *sizes):
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(sizes, f32), names)


def mixture(*layers):
    """A router, experts with biases, and a dense layer; `layers` are sizes of a leading axis over depth."""
    axes = ("layers",) * len(layers)
    return {
        "router": {"kernel": boxed((*axes, "embed", "expert"), *layers, DIM, EXPERTS)},
        "experts": {
            "up": {"kernel": boxed((*axes, "expert", "embed", "mlp"), *layers, EXPERTS, DIM, HIDDEN)},
            "down": {
                "kernel": boxed((*axes, "expert", "mlp", "embed"), *layers, EXPERTS, HIDDEN, DIM),
                "bias": boxed((*axes, "expert", "embed"), *layers, EXPERTS, DIM),
            },
        },
        "dense": {"kernel": boxed((*axes, "embed", "embed2"), *layers, DIM, DIM)},
    }


def ragged(params, x):
    """Every token goes to its two experts, whatever their load."""
    logits = x @ params["router"]["kernel"]
    weights, chosen = lax.top_k(jax.nn.softmax(logits), TOP)
    chosen = chosen.reshape(-1)
    order = jnp.argsort(chosen)
    sizes = jnp.bincount(chosen, length=EXPERTS).astype(jnp.int32)
    rows = x[order // TOP].astype(jnp.bfloat16)
    up, down = params["experts"]["up"], params["experts"]["down"]
    hidden = jax.nn.relu(lax.ragged_dot(rows, up["kernel"].astype(jnp.bfloat16), sizes))
    out = lax.ragged_dot(hidden, down["kernel"].astype(jnp.bfloat16), sizes).astype(f32)
    out = (out + down["bias"][chosen[order]]) * weights.reshape(-1)[order][:, None]
    return jnp.zeros_like(x).at[order // TOP].add(out) + x @ params["dense"]["kernel"]


CAPACITY = 15


def einsums(params, x):
    """Every expert takes CAPACITY tokens, empty places included."""
    logits = x @ params["router"]["kernel"]
    weights, chosen = lax.top_k(jax.nn.softmax(logits.T), CAPACITY)
    up, down = params["experts"]["up"], params["experts"]["down"]
    hidden = jax.nn.relu(jnp.einsum("ecd,edf->ecf", x[chosen], up["kernel"]))
    out = jnp.einsum("ecf,efd->ecd", hidden, down["kernel"]) + down["bias"][:, None, :]
    out = out * weights[:, :, None]
    return jnp.zeros_like(x).at[chosen].add(out) + x @ params["dense"]["kernel"]


def gathered(params, x):
    """Every token takes its experts' matrices; those are stored in 8 bits, with a scale for each column."""
    weights, chosen = lax.top_k(jax.nn.softmax(x @ params["router"]["kernel"]), TOP)
    up, down = params["experts"]["up"], params["experts"]["down"]
    scaled = up["kernel"].astype(jnp.int8).astype(f32) * jnp.ones((EXPERTS, 1, HIDDEN))
    hidden = jax.nn.relu(jnp.einsum("nd,nkdf->nkf", x, scaled[chosen]))
    out = jnp.einsum("nkf,nkfd->nkd", hidden, down["kernel"][chosen]) + down["bias"][chosen]
    return jnp.einsum("nkd,nk->nd", out, weights) + x @ params["dense"]["kernel"]


def once(layer):
    return lambda params, x: layer(nn.meta.unbox(params), x)


def deep(layer):
    def stack(params, x):
        return lax.scan(lambda x, p: (layer(p, x), None), x, nn.meta.unbox(params))[0]

    return stack


MATRICES, BIAS = 2 * EXPERTS * DIM * HIDDEN, EXPERTS * DIM
SHARED = DIM * EXPERTS + DIM * DIM


@pytest.mark.parametrize(
    ("layer", "share"), [(ragged, TOP / EXPERTS), (einsums, CAPACITY / TOKENS), (gathered, TOP / EXPERTS)]
)
def test_a_token_uses_the_experts_it_is_sent_to(layer, share):
    cost = count(once(layer), mixture(), X, tokens=TOKENS)
    assert cost.unknown == ()
    assert cost.parameters == MATRICES + BIAS + SHARED
    assert cost.active == SHARED + share * (MATRICES + BIAS)
    # The router has an axis of experts, and every token meets all of it.
    assert cost.active_by_path["router/kernel"] == DIM * EXPERTS
    through = count(deep(layer), mixture(DEPTH), X, tokens=TOKENS)
    assert (through.parameters, through.active) == (DEPTH * cost.parameters, DEPTH * cost.active)
    again = count(jax.checkpoint(deep(layer)), mixture(DEPTH), X, tokens=TOKENS)
    assert again.active == through.active


def test_without_tokens_or_without_experts_all_are_active():
    assert count(once(ragged), mixture(), X).active == MATRICES + BIAS + SHARED
    dense = {"kernel": boxed(("embed", "mlp"), DIM, HIDDEN)}
    # Twice as many tokens as pass would halve the share.
    cost = count(lambda params, x: x @ params["kernel"].unbox(), dense, X, tokens=2 * TOKENS)
    assert cost.active == cost.parameters == DIM * HIDDEN


def test_an_expert_that_all_tokens_meet_counts_whole():
    params = {"kernel": boxed(("expert", "embed", "mlp"), EXPERTS, DIM, HIDDEN)}
    all_of_them = lambda params, x: jnp.einsum("nd,edf->nf", x, params["kernel"].unbox())
    assert count(all_of_them, params, X, tokens=TOKENS).active == EXPERTS * DIM * HIDDEN
    # A matrix met twice is still no more than itself.
    twice = lambda params, x: all_of_them(params, x) + all_of_them(params, 2 * x)
    assert count(twice, params, X, tokens=TOKENS).active == EXPERTS * DIM * HIDDEN


def test_other_collections_stand_beside_the_parameters():
    variables = {"batch_stats": {"mean": jax.ShapeDtypeStruct((DIM,), f32)}, "params": mixture()}

    def function(variables, x):
        return once(ragged)(variables["params"], x - variables["batch_stats"]["mean"][None])

    cost = count(function, variables, X, tokens=TOKENS)
    assert cost.active == SHARED + TOP / EXPERTS * (MATRICES + BIAS)


def test_rules_say_what_trains():
    cost = count(once(ragged), mixture(), X)
    assert cost.trainable == cost.parameters
    freeze = (r"experts/.*",)
    frozen = count(once(ragged), mixture(), X, trainable=[(pattern, False) for pattern in freeze])
    assert frozen.trainable == SHARED
    only = count(once(ragged), mixture(), X, trainable=[(r".*/bias", True), (r".*", False)])
    assert only.trainable == BIAS
    with pytest.raises(UsageError, match=r"trainable\[0\]: 'head' matches no parameter"):
        count(once(ragged), mixture(), X, trainable=[("head", False)])
