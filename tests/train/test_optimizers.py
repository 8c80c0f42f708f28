"""Optimisers: each rule moves what it names and nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from effjax.config import build, build_kind
from effjax.errors import UsageError
from effjax.matching import named_leaves
from effjax.train import optimizers, schedules
from effjax.train.durations import Budget
from effjax.train.optimizers import KINDS, Momentum, Muon

BUDGET = Budget(total_steps=100, batch_size=1)


def model_params(seed=0):
    """A stacked transformer in miniature: 3 layers, width 8, 2 heads."""
    shapes = {
        "patch_embedding": {"kernel": (4, 8), "bias": (8,)},
        "position_embedding": (5, 8),
        "blocks": {
            "attention": {
                "query": {"kernel": (3, 8, 2, 4), "bias": (3, 2, 4)},
                "output": {"kernel": (3, 2, 4, 8)},
            },
            "ffn": {"up": {"kernel": (3, 8, 16), "bias": (3, 16)}},
            "norm": {"scale": (3, 8)},
        },
        "head": {"kernel": (8, 10), "bias": (10,)},
    }
    leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda s: isinstance(s, tuple))
    rng = np.random.default_rng(seed)
    return tree.unflatten([jnp.asarray(rng.normal(size=s), jnp.float32) for s in leaves])


def moved(optimizer, params, grads, steps=1):
    """Updates after `steps` identical gradients, as `{path: total move}`."""
    transformation = optimizer.transformation(params, BUDGET)
    state, now = transformation.init(params), params
    step = jax.jit(lambda g, s, p: transformation.update(g, s, p))
    for _ in range(steps):
        updates, state = step(grads, state, now)
        now = optax.apply_updates(now, updates)
    return named_leaves(jax.tree.map(lambda a, b: np.asarray(a - b), now, params)), state


def test_decay_acts_on_exactly_the_kernels():
    params = model_params()
    moves, _ = moved(Momentum(lr=0.5, weight_decay=0.1), params, jax.tree.map(jnp.zeros_like, params))
    for path, leaf in named_leaves(params).items():
        expected = -0.5 * 0.1 * np.asarray(leaf) if path.endswith("kernel") else np.zeros(leaf.shape)
        np.testing.assert_allclose(moves[path], expected, rtol=1e-5, atol=1e-7, err_msg=path)


def test_a_decay_rule_of_the_user_comes_first_and_the_others_stay():
    params = model_params()
    optimizer = Momentum(lr=1.0, weight_decay=0.1, decay=(("head/.*", 0.5),))
    shown = {path: row["decay"] for path, row in optimizer.explain(params).items()}
    assert shown["head/kernel"] == shown["head/bias"] == 0.5
    assert shown["blocks/ffn/up/kernel"] == 1.0
    assert shown["blocks/norm/scale"] == shown["position_embedding"] == 0.0
    moves, _ = moved(optimizer, params, jax.tree.map(jnp.zeros_like, params))
    np.testing.assert_allclose(moves["head/bias"], -0.05 * params["head"]["bias"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"still"}))
def test_the_frozen_never_move_and_have_no_state(kind):
    params = model_params()
    optimizer = KINDS[kind](lr=0.1, weight_decay=0.1, clip=1.0, freeze=("blocks/.*", "head/bias"))
    moves, state = moved(optimizer, params, jax.tree.map(jnp.ones_like, params), steps=3)
    for path, move in moves.items():
        assert (np.abs(move).max() == 0) == (path.startswith("blocks/") or path == "head/bias"), path
    frozen_shapes = {leaf.shape for path, leaf in named_leaves(params).items() if path.startswith("blocks/")}
    assert not frozen_shapes & {leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim}
    assert not any("blocks" in path for path in named_leaves(state))


def test_freezing_everything_is_refused():
    with pytest.raises(UsageError, match="nothing to train"):
        Momentum(lr=0.1, freeze=(".*",)).transformation(model_params(), BUDGET)


@pytest.mark.parametrize("field", ["freeze", "decay", "learning_rate", "matrices"])
def test_a_rule_that_matches_nothing_is_named(field):
    value = ("haed/.*",) if field == "freeze" else (("haed/.*", "" if field == "matrices" else 1.0),)
    with pytest.raises(UsageError, match=rf"{field}\[0\]: 'haed/\.\*' matches no parameter"):
        Muon(lr=0.1, **{field: value}).transformation(model_params(), BUDGET)


def test_learning_rate_multipliers_scale_the_whole_update():
    params, grads = model_params(), model_params(1)
    plain, _ = moved(KINDS["adamw"](lr=0.1, weight_decay=0.1), params, grads)
    scaled, _ = moved(
        KINDS["adamw"](lr=0.1, weight_decay=0.1, learning_rate=(("head/.*", 10.0), ("blocks/.*", 0.5))),
        params,
        grads,
    )
    for path, move in plain.items():
        factor = 10.0 if path.startswith("head/") else 0.5 if path.startswith("blocks/") else 1.0
        np.testing.assert_allclose(scaled[path], factor * move, rtol=2e-4, atol=1e-6, err_msg=path)


def test_clip_bounds_the_global_norm_of_the_trained_alone():
    params, grads = model_params(), model_params(1)
    grads["head"]["kernel"] = 1e6 * grads["head"]["kernel"]
    optimizer = Momentum(lr=1.0, momentum=0.0, clip=0.25, freeze=("head/kernel",))
    moves, _ = moved(optimizer, params, grads)
    norm = np.sqrt(sum(np.sum(np.square(m, dtype=np.float64)) for m in moves.values()))
    # Had the frozen gradient counted, next to nothing would be left of the others.
    np.testing.assert_allclose(norm, 0.25, rtol=1e-4)


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"still"}))
def test_each_kind_reduces_a_quadratic(kind):
    params, target = model_params(), model_params(1)

    def loss(p):
        return sum(jnp.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (p, target)), strict=True))

    rate = {"adamw": 0.1, "lion": 0.1, "adafactor": 0.1, "muon": 0.2, "sgd": 0.05}[kind]
    optimizer = KINDS[kind](lr=rate, schedule=schedules.Cosine())
    transformation = optimizer.transformation(jax.eval_shape(lambda: params), BUDGET)

    def step(carry, _):
        p, s = carry
        updates, s = transformation.update(jax.grad(loss)(p), s, p)
        return (optax.apply_updates(p, updates), s), None

    (final, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=100))(
        (params, transformation.init(params))
    )
    assert loss(final) < 0.05 * loss(params)


def test_adamw_is_the_adamw_of_optax():
    params = {"kernel": jnp.arange(6.0).reshape(2, 3)}
    ours = KINDS["adamw"](lr=0.1, weight_decay=0.02).transformation(params, BUDGET)
    theirs = optax.adamw(0.1, weight_decay=0.02)
    grads = {"kernel": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3)}
    a, _ = ours.update(grads, ours.init(params), params)
    b, _ = theirs.update(grads, theirs.init(params), params)
    np.testing.assert_allclose(a["kernel"], b["kernel"], rtol=1e-6)


def test_muon_orthogonalises_each_layer_of_a_stack():
    params, grads = model_params(), model_params(1)
    stacked, _ = moved(Muon(lr=1.0), params, grads)
    for path, axes in (("query/kernel", "in out out"), ("output/kernel", "in in out")):
        leaf = np.asarray(named_leaves(grads["blocks"]["attention"])[path])
        for layer in range(3):
            one = {"w": jnp.asarray(leaf[layer])}
            alone, _ = moved(Muon(lr=1.0, matrices=(("w", axes),)), one, one)
            np.testing.assert_allclose(stacked[f"blocks/attention/{path}"][layer], alone["w"], atol=1e-4)
    # One layer of `query` is a matrix of 8 x (2 * 4); Newton-Schulz leaves singular values around one.
    update = stacked["blocks/attention/query/kernel"][1].reshape(8, 8) / (0.2 * np.sqrt(8))
    singular = np.linalg.svd(update, compute_uv=False)
    assert singular.min() > 0.3
    assert singular.max() < 1.3


def test_muon_on_plain_matrices_is_the_muon_of_optax():
    params, grads = (
        {"w": {"kernel": jnp.eye(4, 6)}},
        {"w": {"kernel": model_params()["head"]["kernel"][:4, :6]}},
    )
    theirs = contrib.muon(0.1, consistent_rms=0.2)
    expected, _ = theirs.update(grads, theirs.init(params), params)
    moves, _ = moved(Muon(lr=0.1), params, grads)
    np.testing.assert_allclose(moves["w/kernel"], expected["w"]["kernel"], atol=1e-4)


def test_muon_says_which_parameters_are_matrices():
    shown = {path: row["matrix"] for path, row in Muon(lr=1.0).explain(model_params()).items()}
    assert {path for path, axes in shown.items() if axes} == {
        "blocks/attention/query/kernel",
        "blocks/attention/output/kernel",
        "blocks/ffn/up/kernel",
    }


@pytest.mark.parametrize(
    ("axes", "message"),
    [("in heads", "must name axes"), ("out", "must name axes"), ("in in in out", r"\(8, 10\), fewer axes")],
)
def test_muon_refuses_axes_that_make_no_matrix(axes, message):
    with pytest.raises(UsageError, match=message):
        Muon(lr=1.0, matrices=(("head/kernel", axes),)).transformation(model_params(), BUDGET)


def test_the_learning_rate_is_readable_and_follows_the_schedule():
    section = {"kind": "sgd", "lr": 2.0, "momentum": 0.0, "schedule": {"kind": "linear", "warmup": "10%"}}
    optimizer = build_kind(KINDS, section, "config.optimizer")
    assert [float(optimizer.learning_rate_at(s, BUDGET)) for s in (0, 5, 10, 55, 100)] == [0, 1, 2, 1, 0]
    params = {"w": jnp.zeros(())}
    transformation = optimizer.transformation(params, BUDGET)
    state = transformation.init(params)
    for step in range(12):
        updates, state = transformation.update({"w": jnp.ones(())}, state, params)
        np.testing.assert_allclose(updates["w"], -optimizer.learning_rate_at(step, BUDGET), rtol=1e-6)


@pytest.mark.parametrize("bad", [{"lr": 0.0}, {"lr": 1.0, "clip": -1.0}])
def test_nonsense_numbers_are_refused_with_their_path(bad):
    with pytest.raises(UsageError, match=r"config\.optimizer: (lr|clip) must be positive"):
        build(optimizers.AdamW, bad, "config.optimizer")


def test_the_kinds_share_their_fields():
    shared = {field.name for field in dataclasses.fields(optimizers.Optimizer)}
    assert all(shared <= {field.name for field in dataclasses.fields(kind)} for kind in KINDS.values())


def test_still_weights_may_be_integers_and_have_no_state():
    params = {"kernel": {"codes": jnp.ones((2, 3), jnp.uint8), "scale": jnp.ones(3)}}
    rule = KINDS["still"]().transformation(params, BUDGET)
    assert not jax.tree.leaves(rule.init(params))
    updates, _ = rule.update(params, rule.init(params), params)
    assert all(not leaf.any() for leaf in jax.tree.leaves(updates))
