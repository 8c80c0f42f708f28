"""Sharpness against closed forms, corners and brute force."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.errors import UsageError
from effjax.measure.sharpness import relative_rise, sharpness, worst_logits
from effjax.train.tasks.language import cross_entropy

KEY = jax.random.key(0)


@pytest.mark.parametrize("at_minimum", [True, False])
def test_of_a_quadratic_loss_it_is_the_closed_form(at_minimum, draw):
    h = draw.uniform(0.1, 3, size=6)
    x = np.zeros(6) if at_minimum else draw.normal(size=6)
    found = jax.jit(lambda x: sharpness(lambda v: 0.5 * jnp.sum(jnp.float32(h) * v**2), x, 0.1, KEY))(
        jnp.float32(x)
    )
    loss = 0.5 * np.sum(h * x**2)
    worst = 0.5 * np.sum(h * (np.abs(x) + 0.1 * (np.abs(x) + 1)) ** 2)
    np.testing.assert_allclose(found, 100 * (worst - loss) / (1 + loss), rtol=1e-5)


def test_it_is_zero_without_a_box_and_grows_with_it(draw):
    weights = jnp.asarray(draw.normal(size=(8, 5)), jnp.float32)

    def loss(x):
        return jnp.sum(jnp.sin(weights @ x) ** 2)  # many maxima

    x = jnp.asarray(draw.normal(size=5), jnp.float32)
    np.testing.assert_allclose(jax.jit(lambda x: sharpness(loss, x, 0.0, KEY))(x), 0, atol=1e-4)
    grown = [jax.jit(lambda x, e=e: sharpness(loss, x, e, KEY))(x) for e in (1e-3, 1e-2, 1e-1)]
    assert 0 < grown[0] < grown[1] < grown[2]
    with pytest.raises(UsageError, match="must be at least 0"):
        sharpness(loss, x, -1.0, KEY)


def test_the_worst_logits_are_the_best_corner_of_all(draw):
    logits, target, epsilon = draw.normal(size=5), 2, 0.3
    radius = epsilon * (np.abs(logits) + 1)

    def loss(z):
        return np.log(np.exp(z).sum()) - z[target]

    corners = [loss(logits + radius * np.array(sign)) for sign in itertools.product((-1, 1), repeat=5)]
    worst = worst_logits(jnp.float32(logits), jnp.asarray(target), epsilon)
    np.testing.assert_allclose(loss(np.asarray(worst, np.float64)), max(corners), rtol=1e-6)
    assert np.all(np.abs(worst - jnp.float32(logits)) <= jnp.float32(radius) * 1.0001)


def test_ascent_on_logits_finds_them(draw):
    logits = jnp.asarray(draw.normal(size=(2, 3, 4)), jnp.float32)
    targets = jnp.asarray(draw.integers(0, 4, size=(2, 3)))

    def loss(flat):
        return jnp.mean(cross_entropy(flat.reshape(2, 3, 4), targets)[0])

    found = jax.jit(lambda z: sharpness(loss, z, 0.05, KEY))(logits.ravel())
    exact = relative_rise(loss(worst_logits(logits, targets, 0.05).ravel()), loss(logits.ravel()))
    np.testing.assert_allclose(found, exact, rtol=1e-4)
