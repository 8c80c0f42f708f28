import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from configs.language.moe import get_config
from effjax.compress.steps.compressed_experts import compressed
from effjax.config import build_kind
from effjax.errors import UsageError
from effjax.ffn import KINDS, CompressedMixture, Mixture
from effjax.measure import count
from effjax.measure.analytic.sparse_traffic import Sparse
from effjax.models import KINDS as MODELS

X = jax.random.normal(jax.random.key(0), (2, 5, 8))


def made(seed=2, **fields):
    ffn = CompressedMixture(**{**dict(experts=6, chosen=4, hidden=12, main=2, normalised=False), **fields})
    shapes = jax.eval_shape(lambda: meta.unbox(ffn.init(jax.random.key(1), X)))["params"]
    draw = np.random.default_rng(seed)
    return ffn, {
        name: jax.tree.map(lambda leaf: jnp.float32(draw.normal(size=leaf.shape)), tree)
        for name, tree in sorted(shapes.items())
    }


def plain(params):
    return {name: tree for name, tree in params.items() if not name.startswith("compressed")}


def still(params):
    """The vectors as they are at the start."""
    return {name: 0 * tree if name.startswith("compressed") else tree for name, tree in params.items()}


def run(ffn, params, **options):
    return np.asarray(jax.jit(lambda params: ffn.apply({"params": params}, X, **options))(params))


def by_hand(ffn, params):
    """Token by token, expert by expert, in float64."""
    p = jax.tree.map(np.float64, params)
    silu = lambda a: a / (1 + np.exp(-a))
    out = np.zeros(X.shape)
    for at in np.ndindex(X.shape[:-1]):
        x = np.float64(X[at])
        scores = np.exp(x @ p["router"]["kernel"])
        scores /= scores.sum()
        best = np.argsort(-scores)[: ffn.chosen]
        gates = scores[best] / (scores[best].sum() if ffn.normalised else 1.0)
        rest = best[ffn.main :]
        share = scores[rest] / scores[rest].sum()
        if ffn.vectors == "token":
            gate = expand = 1 + share @ p["compressed"][rest]
            contract = np.ones(ffn.hidden)
        else:
            gate, expand, contract = (
                1 + share @ p[f"compressed_{name}"][rest] for name in ("gate", "expand", "contract")
            )
        for weight, e in zip(gates[: ffn.main], best, strict=False):
            h = silu((x * gate) @ p["gate_kernel"][e]) * ((x * expand) @ p["expand_kernel"][e])
            out[at] += weight * ((h * contract) @ p["contract_kernel"][e])
    return out


@pytest.mark.parametrize("fields", [dict(), dict(vectors="token"), dict(normalised=True), dict(main=3)])
def test_equals_the_equation(fields):
    ffn, params = made(**fields)
    np.testing.assert_allclose(run(ffn, params), by_hand(ffn, params), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("fields", [dict(), dict(normalised=True), dict(scores="sigmoid", shared=3)])
def test_with_all_experts_run_it_is_its_parent(fields):
    ffn, params = made(main=4, **fields)
    assert not any(name.startswith("compressed") for name in params)
    parent = Mixture(**(dict(experts=6, chosen=4, hidden=12, normalised=False) | fields))
    np.testing.assert_array_equal(run(ffn, params), run(parent, params))


@pytest.mark.parametrize("vectors", ["matrix", "token"])
def test_at_the_start_it_is_its_main_experts_exactly(vectors):
    ffn, params = made(vectors=vectors)
    expected = run(Mixture(6, 2, 12, normalised=False), plain(params))
    np.testing.assert_array_equal(run(ffn, still(params)), expected)
    none, _ = made(vectors="none")
    np.testing.assert_array_equal(run(none, plain(params)), expected)
    assert np.abs(run(ffn, params) - expected).max() > 0.01


def test_main_experts_keep_their_weights_among_all_that_are_chosen():
    ffn, params = made(normalised=True)
    alone = run(Mixture(6, 2, 12, normalised=True), plain(params))
    kernel = params["router"]["kernel"]
    gates = -np.sort(-np.asarray(jax.nn.softmax(X @ kernel)), axis=-1)
    share = gates[..., :2].sum(-1) / gates[..., :4].sum(-1)
    np.testing.assert_allclose(run(ffn, still(params)), alone * share[..., None], rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_vectors_of_those_that_were_not_run():
    ffn, params = made(experts=40, chosen=3, main=1)
    loss = jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(ffn.apply({"params": params}, X)))))
    gradient = loss(still(params))
    order = np.argsort(-np.asarray(X.reshape(-1, 8) @ params["router"]["kernel"]), axis=-1)
    for name in ("gate", "expand", "contract"):
        reached = np.flatnonzero(np.abs(gradient[f"compressed_{name}"]).sum(1))
        np.testing.assert_array_equal(reached, np.unique(order[:, 1:3]))
        reached = np.flatnonzero(np.abs(gradient[f"{name}_kernel"]).sum((1, 2)))
        np.testing.assert_array_equal(reached, np.unique(order[:, 0]))
    assert np.abs(gradient["router"]["kernel"]).max() > 0


def test_experts_without_gates_have_two_vectors_and_a_full_expert_drops_tokens():
    ffn, params = made(gated=False, capacity=1.0)
    assert {name for name in params if name.startswith("compressed")} == {
        "compressed_expand",
        "compressed_contract",
    }
    expected = run(Mixture(6, 2, 12, gated=False, normalised=False, capacity=1.0), plain(params))
    np.testing.assert_array_equal(run(ffn, still(params)), expected)


def test_scores_that_vanish_are_no_division_by_zero():
    ffn, params = made()
    params["router"] = {"kernel": 1e4 * params["router"]["kernel"]}
    assert np.isfinite(run(ffn, params)).all()


# OLMoE-1B-7B and Phi-3.5-MoE: layers, width, hidden channels, experts, chosen; parameters that a token meets
# with all and with half of its experts, and how many are fewer, in %.
PUBLISHED = {
    "olmoe": ((16, 2048, 1024, 64, 8), 1.28e9, 403e6, 31),
    "phi": ((32, 4096, 6400, 16, 2), 6.64e9, 2.52e9, 38),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_active_parameters_are_the_published_ones(name):
    (layers, width, hidden, experts, chosen), active, fewer, percent = PUBLISHED[name]
    parent = Mixture(experts, chosen, hidden)
    half = compressed(parent, vectors="none")
    gone = layers * (Sparse.of(parent, width).active - Sparse.of(half, width).active)
    assert gone == pytest.approx(fewer, rel=2e-3)
    assert round(100 * gone / active) == percent


def test_the_counter_finds_them_too():
    config = get_config("olmoe-1b-7b")
    tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)

    def active(ffn):
        section = config.model.to_dict()
        section["block"]["ffn"] |= ffn
        model = build_kind(MODELS, section, "config.model")
        params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
        forward = lambda params, tokens: model.apply({"params": meta.unbox(params)}, tokens)
        return count(forward, params, tokens, tokens=64).active

    whole, half = active({}), active(dict(kind="compressed_mixture", main=4))
    assert whole == pytest.approx(1.28e9, rel=2e-3)
    assert whole - half == pytest.approx(403e6, rel=5e-3)
    assert round(100 * (whole - half) / whole) == 31


def test_it_is_a_kind_and_wrong_requests_are_named():
    assert KINDS["compressed_mixture"] is CompressedMixture
    with pytest.raises(UsageError, match="main=3 of chosen=2"):
        CompressedMixture(4, 2, 8, main=3)
    with pytest.raises(UsageError, match="main=0"):
        CompressedMixture(4, 2, 8, main=0)
    with pytest.raises(UsageError, match="no closed form"):
        Sparse.of(CompressedMixture(4, 2, 8), 16)
    with pytest.raises(UsageError, match="no order"):
        CompressedMixture(4, 2, 8, choice="expert")
