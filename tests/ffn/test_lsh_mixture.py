"""Means of similar tokens: exact where there is place or nothing to lose, and what is lost is bounded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.errors import UsageError
from effjax.ffn import LSHMixture, Mixture
from effjax.ffn.lsh_mixture import clusters, mean

WIDTH, FIELDS = 8, dict(experts=4, chosen=2, hidden=6)
X = jax.random.normal(jax.random.key(0), (2, 16, WIDTH))


def variables_of(module, x=X):
    shapes = meta.unbox(jax.eval_shape(module.init, jax.random.key(1), x))
    draw = np.random.default_rng(2)
    return jax.tree.map(lambda leaf: jnp.float32(draw.normal(size=leaf.shape)), shapes)


def values(module, x=X, variables=None, train=True):
    apply = jax.jit(module.apply, static_argnames="train")
    return np.asarray(apply(variables or variables_of(module, x), x, train=train))


class Linear(LSHMixture):
    """Every expert multiplies with the same number."""

    def run_through(self, rows, sizes, kernels, factors=None):
        return 0.75 * rows


def test_with_a_place_for_every_token_it_is_the_mixture():
    expected = values(Mixture(**FIELDS))
    np.testing.assert_allclose(values(LSHMixture(**FIELDS, rate=2.0)), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(values(LSHMixture(**FIELDS, rate=0.2)) - expected).max() > 0.1


def test_an_evaluation_sends_every_token():
    found = values(LSHMixture(**FIELDS, rate=0.2), train=False)
    np.testing.assert_allclose(found, values(Mixture(**FIELDS)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compensated", [True, False])
def test_of_equal_tokens_nothing_is_lost(compensated):
    alike = jnp.tile(X[:, :3], (1, 11, 1))  # 66 tokens, 6 different ones
    lsh = LSHMixture(**FIELDS, rate=0.2, compensated=compensated)  # 7 places an expert
    np.testing.assert_allclose(values(lsh, alike), values(Mixture(**FIELDS), alike), rtol=1e-4, atol=1e-5)


def test_what_is_lost_is_the_difference_that_an_expert_would_have_made_of_the_residual():
    """E = 3/4: with the residual 1/4 of it is lost, without it 3/4."""
    exact = 0.75 * np.asarray(X)
    lost = {c: np.abs(values(Linear(**FIELDS, rate=0.2, compensated=c)) - exact) for c in (True, False)}
    np.testing.assert_allclose(3 * lost[True], lost[False], rtol=1e-3, atol=1e-4)
    assert lost[True].max() > 0.05


def test_an_error_is_bounded_by_the_slope_of_the_expert():
    """|E(c) + x - c - E(x)| <= (L + 1) |x - c|, L at most the product of the matrices' norms."""
    lsh = LSHMixture(**{**FIELDS, "chosen": 1}, gated=False, activation="relu", rate=0.3)
    variables = variables_of(lsh)
    held = variables["params"]
    norms = np.linalg.norm(held["expand_kernel"], 2, (1, 2)) * np.linalg.norm(
        held["contract_kernel"], 2, (1, 2)
    )
    error = np.linalg.norm(values(lsh, X, variables) - values(lsh.clone(rate=4.0), X, variables), axis=-1)
    tokens = X.reshape(-1, WIDTH)
    index = jnp.argmax(tokens @ held["router"]["kernel"], -1)[:, None]
    _, places, left = jax.jit(lambda x, i: lsh.placed(x, i, True))(tokens, index)
    away = np.linalg.norm(left[:, 0], axis=-1).reshape(error.shape)
    assert (error <= (norms[index[:, 0]].reshape(error.shape) + 1) * away + 1e-5).all()
    assert error.max() > 0.1
    assert len(np.unique(places)) <= 4 * 10  # ceil(0.3 x 32 / 4)


def test_gradients_flow_through_means_and_residuals():
    lsh = LSHMixture(**FIELDS, rate=0.4)
    variables = variables_of(lsh)
    loss = jax.jit(lambda v, x: jnp.sum(jnp.sin(lsh.apply(v, x, train=True))))
    gradient = jax.jit(jax.grad(loss, (0, 1)))(variables, X)
    # Along the experts alone, as routes and codes jump: those of x by a shift that all tokens share in C.
    draw = np.random.default_rng(3)
    towards = jax.tree.map(lambda leaf: jnp.float32(draw.normal(size=leaf.shape)), variables)
    towards["params"]["router"] = jax.tree.map(jnp.zeros_like, towards["params"]["router"])
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, t: jnp.vdot(g, t), gradient[0], towards)))
    step = 1e-3
    moved = [loss(jax.tree.map(lambda v, t, s=s: v + s * t, variables, towards), X) for s in (step, -step)]
    assert (moved[0] - moved[1]) / (2 * step) == pytest.approx(float(slope), rel=2e-2)
    assert np.isfinite(gradient[1]).all()
    assert (np.abs(gradient[1]).sum(-1) > 0).all()


def test_a_group_knows_nothing_of_the_others():
    lsh = LSHMixture(**FIELDS, rate=0.3, group=16)
    variables = variables_of(lsh)
    apart = [values(lsh, X[i : i + 1], variables) for i in range(2)]
    np.testing.assert_allclose(values(lsh, X, variables), np.concatenate(apart), rtol=1e-5, atol=1e-6)
    one = values(lsh, X[:1, :1], variables)  # as when a text is written
    np.testing.assert_allclose(one, values(Mixture(**FIELDS), X[:1, :1], variables), rtol=1e-4, atol=1e-5)


def test_places_go_by_codes_and_codes_share_them_in_order():
    index = jnp.array([[0, 1]] * 8)
    codes = jnp.array([[0, 5], [3, 1], [0, 5], [2, 2], [0, 6], [3, 1], [9, 9], [9, 9]])
    run = jax.jit(clusters, static_argnums=(2, 3))
    of = run(index, codes, 3, 6)  # codes in order: 05, 06, 22, 31, 99
    assert of[:, 0].tolist() == [0, 3, 0, 2, 1, 3, 4, 4]
    assert of[:, 1].tolist() == [6, 9, 6, 8, 7, 9, 10, 10]
    two = run(index, codes, 3, 2)  # the first three of five, and the last two
    assert two[:, 0].tolist() == [0, 1, 0, 0, 0, 1, 1, 1]
    eight = run(index, codes, 3, 8)  # each its own
    assert sorted(eight[:, 0].tolist()) == list(range(8))
    nobody = run(index.at[0].set(3), codes, 3, 2)
    assert nobody[0].tolist() == [6, 6]


def test_a_mean_is_that_of_its_place():
    x, place = jnp.arange(6.0).reshape(3, 2), jnp.array([[0], [2], [2]])
    found = jax.jit(mean, static_argnums=2)(x, place, 3)
    assert found.tolist() == [[0, 1], [0, 0], [3, 4]]


def test_nearby_tokens_share_codes_and_length_does_not_matter():
    lsh = LSHMixture(**FIELDS, hashes=2, directions=8)
    codes = jax.jit(lsh.codes)
    assert jnp.array_equal(codes(X), codes(3.0 * X))
    assert jnp.mean(codes(X) == codes(X + 1e-3)) > 0.95
    assert jnp.array_equal(codes(-X) ^ 1, codes(X))  # the opposite corner
    assert set(np.unique(codes(X))) <= set(range(16))


def test_what_it_cannot_is_refused():
    for fields, match in [
        ({"room": 1.0}, "leave room out"),
        ({"hashes": 0}, "hashes=0"),
        ({"rate": 0.0}, "drops"),
    ]:
        with pytest.raises(UsageError, match=match):
            LSHMixture(**FIELDS, **fields)
