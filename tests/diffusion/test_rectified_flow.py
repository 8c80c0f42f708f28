import jax.numpy as jnp
import numpy as np
import pytest

from effjax.diffusion.rectified_flow import RectifiedFlow
from effjax.errors import UsageError


def drawn():
    draw = np.random.default_rng(0)
    x0, eps = (jnp.asarray(draw.normal(size=(4, 2, 2, 1)), jnp.float32) for _ in range(2))
    return x0, eps, jnp.array([0.0, 0.25, 0.5, 1.0])


def test_ends_of_the_line():
    x0, eps, t = drawn()
    x_t = RectifiedFlow().noise(x0, eps, t)
    np.testing.assert_array_equal(x_t[0], x0[0])  # t = 0 is the picture
    np.testing.assert_array_equal(x_t[3], eps[3])  # t = 1 is noise
    np.testing.assert_allclose(x_t[1], 0.75 * x0[1] + 0.25 * eps[1], rtol=1e-6)


def test_target_is_the_slope_and_reads_back():
    x0, eps, t = drawn()
    flow = RectifiedFlow()
    v = flow.target(x0, eps, t)
    slope = (flow.noise(x0, eps, t + 0.125) - flow.noise(x0, eps, t)) / 0.125
    np.testing.assert_allclose(v, slope, atol=2e-6)
    got_x0, got_eps = flow.to_x0_eps(v, flow.noise(x0, eps, t), t)
    np.testing.assert_allclose(got_x0, x0, atol=1e-6)
    np.testing.assert_allclose(got_eps, eps, atol=1e-6)
    np.testing.assert_allclose(flow.loss(v + 2.0, x0, eps, t)["loss"], 4.0, rtol=1e-6)


def test_densities():
    grid = jnp.asarray((np.arange(1000) + 0.5) / 1000, jnp.float32)
    np.testing.assert_array_equal(RectifiedFlow().times(grid), grid)
    t = np.asarray(RectifiedFlow("logit_normal", mean=0.5, deviation=2.0).times(grid), np.float64)
    logit = np.log(t / (1 - t))
    assert logit.mean() == pytest.approx(0.5, abs=1e-3)
    assert logit.std() == pytest.approx(2.0, rel=0.01)
    ends = RectifiedFlow("logit_normal").times(jnp.array([0.0, 1 - 2**-24]))
    assert np.all(np.isfinite(ends))


def test_network_is_told_a_number_up_to_1000():
    assert RectifiedFlow().network_time(jnp.array([0.0, 0.5, 1.0])).tolist() == [0.0, 500.0, 1000.0]


def test_bad_deviation():
    with pytest.raises(UsageError, match="deviation=0 must be above 0"):
        RectifiedFlow("logit_normal", deviation=0.0)
