"""The moving average against its closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.errors import UsageError
from effjax.train.ema import Ema


def test_without_warmup_the_initial_weight_is_decay_to_the_t():
    ema = Ema(decay=0.9, warmup=False)
    average = ema.init({"w": jnp.full((2,), 5.0)})
    for step in range(7):
        average = ema.update(average, {"w": jnp.full((2,), 1.0)}, step)
    np.testing.assert_allclose(average["w"], 1.0 + 4.0 * 0.9**7, rtol=1e-6)


def test_warmup_follows_its_formula_and_ends_at_decay():
    ema = Ema(decay=0.9)
    np.testing.assert_allclose([ema.decay_at(t) for t in (0, 8, 10**6)], [1 / 10, 9 / 18, 0.9], rtol=1e-6)
    initial, rng = np.float64(3.0), np.random.default_rng(0)
    average, expected = ema.init(jnp.float32(initial)), initial
    update = jax.jit(ema.update)
    for t, value in enumerate(rng.normal(size=100)):
        decay = min(0.9, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * value
        average = update(average, jnp.float32(value), jnp.int32(t))
    np.testing.assert_allclose(average, expected, rtol=1e-5)


def test_the_copy_can_be_donated_beside_the_parameters():
    params = {"w": jnp.ones((4,))}
    average = Ema().init(params)
    assert average["w"].unsafe_buffer_pointer() != params["w"].unsafe_buffer_pointer()


def test_dtypes_stay_and_integers_take_the_newest():
    params = {"w": jnp.ones((2,), jnp.bfloat16), "n": jnp.int32(1)}
    ema = Ema(decay=0.5, warmup=False)
    average = ema.update(ema.init(params), {"w": jnp.zeros((2,), jnp.bfloat16), "n": jnp.int32(7)}, 0)
    assert average["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(average["w"].astype(jnp.float32), 0.5)
    assert int(average["n"]) == 7


def test_a_decay_of_one_is_refused():
    with pytest.raises(UsageError, match=r"decay must lie in \[0, 1\)"):
        Ema(decay=1.0)
