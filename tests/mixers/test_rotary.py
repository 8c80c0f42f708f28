import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.config import build
from effjax.errors import UsageError
from effjax.mixers import Attention
from effjax.mixers.context import Context
from effjax.mixers.rotary import (
    SCALINGS,
    Dynamic,
    Linear,
    Llama3,
    LongRope,
    Yarn,
    plain_frequencies,
    rotate,
    table,
    yarn_amplitude,
)

BASE, DIMS = 10_000.0, 16
PLAIN = plain_frequencies(BASE, DIMS)


def test_plain_frequencies():
    np.testing.assert_allclose(PLAIN, [BASE ** (-2 * i / DIMS) for i in range(8)])


def test_neighbours_turn_as_complex_numbers_and_the_rest_stays():
    x = jnp.arange(1.0, 7.0).reshape(1, 1, 1, 6)
    turned = rotate(x, jnp.array([[5]]), jnp.array([1.0, 0.1]), 2.0, "neighbours")[0, 0, 0]
    pairs = 2 * np.array([1 + 2j, 3 + 4j]) * np.exp(1j * 5 * np.array([1.0, 0.1]))
    np.testing.assert_allclose(turned[:4], np.stack([pairs.real, pairs.imag], 1).ravel(), rtol=1e-5)
    np.testing.assert_array_equal(turned[4:], x[0, 0, 0, 4:])


def test_linear_divides_positions():
    frequencies, amplitude = Linear(4.0).table(BASE, DIMS, None)
    np.testing.assert_allclose(frequencies, PLAIN / 4, rtol=1e-6)
    assert amplitude == 1.0


def test_llama3_keeps_high_and_divides_low_frequencies():
    length = 8192
    frequencies, _ = Llama3(8.0, 1.0, 4.0, length).table(BASE, DIMS, None)
    turns = length * PLAIN / (2 * math.pi)
    ratio = np.asarray(frequencies) / PLAIN
    np.testing.assert_allclose(ratio[turns > 4], 1.0, rtol=1e-6)
    np.testing.assert_allclose(ratio[turns < 1], 1 / 8, rtol=1e-6)
    between = (turns > 1) & (turns < 4)
    assert between.any()
    assert ((ratio[between] > 1 / 8) & (ratio[between] < 1)).all()


def test_dynamic_is_plain_within_the_trained_length_and_grows_beyond():
    scaling = Dynamic(4.0, 100)
    within, _ = scaling.table(BASE, DIMS, jnp.int32(100))
    np.testing.assert_allclose(within, PLAIN, rtol=1e-6)
    beyond, _ = scaling.table(BASE, DIMS, jnp.int32(250))
    grown = BASE * (4 * 250 / 100 - 3) ** (DIMS / (DIMS - 2))
    np.testing.assert_allclose(beyond, plain_frequencies(grown, DIMS), rtol=1e-5)


def test_yarn_ramps_between_its_borders():
    scaling = Yarn(4.0, 2048)
    frequencies, amplitude = scaling.table(BASE, DIMS, None)
    turns = 2048 * PLAIN / (2 * math.pi)
    ratio = np.asarray(frequencies) / PLAIN
    np.testing.assert_allclose(ratio[turns > 64], 1.0, rtol=1e-6)
    np.testing.assert_allclose(ratio[turns < 0.5], 1 / 4, rtol=1e-6)
    assert (np.diff(ratio) <= 1e-6).all()
    assert amplitude == pytest.approx(0.1 * math.log(4) + 1)
    assert yarn_amplitude(0.5) == 1.0


def test_longrope_chooses_by_length():
    short, long = tuple(map(float, range(1, 9))), tuple(map(float, range(11, 19)))
    scaling = LongRope(short, long, 10, 1.5)
    for length, divisors in ((10, short), (11, long)):
        frequencies, amplitude = table(BASE, DIMS, scaling, jnp.arange(length)[None])
        np.testing.assert_allclose(frequencies, PLAIN / np.array(divisors), rtol=1e-6)
        assert amplitude == 1.5
    with pytest.raises(UsageError, match="2 divisors were given for 8"):
        LongRope((1.0, 2.0), long, 10).table(BASE, DIMS, None)
    with pytest.raises(UsageError, match="depend on the length"):
        scaling.table(BASE, DIMS, None)


def test_a_config_names_a_scaling_and_it_reaches_the_attention():
    scaling = dict(kind="linear", factor=2.0)
    section = dict(heads=2, rotary_base=100.0, rotary_scaling=scaling, rotary_dims=4)
    attention = build(Attention, section, "config.mixer")
    assert isinstance(attention.rotary_scaling, SCALINGS["linear"])
    x = jax.random.normal(jax.random.key(0), (1, 5, 12))
    params = attention.init(jax.random.key(1), x, Context())
    halved = attention.clone(rotary_scaling=None)
    there = halved.apply(params, x, Context(positions=jnp.arange(0, 10, 2)[None]))
    here = attention.apply(params, x, Context(positions=jnp.arange(0, 20, 4)[None]))
    np.testing.assert_allclose(here, there, rtol=1e-5, atol=1e-6)
    with pytest.raises(UsageError, match="no 5 in pairs"):
        attention.clone(rotary_dims=5).init(jax.random.key(1), x, Context())
