import jax.numpy as jnp
import numpy as np
import pytest

from effjax.diffusion.guidance import guided
from effjax.errors import UsageError

NULL = 9


def denoiser(x_t, t, label):
    """Depends on all of its inputs, with a second half of channels for the variance."""
    shift = (label.astype(jnp.float32) + t)[:, None, None, None]
    return jnp.concatenate([jnp.sin(x_t + shift), jnp.cos(x_t * shift)], axis=-1)


def inputs():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 2, 4)), jnp.float32)
    return x, jnp.array([1.0, 2.0, 3.0]), jnp.array([0, 4, 7])


def halves(x, t, label):
    return denoiser(x, t, label), denoiser(x, t, jnp.full_like(label, NULL))


def test_scales_0_and_1_are_exact():
    conditional, unconditional = halves(*inputs())
    np.testing.assert_array_equal(guided(denoiser, 1.0, NULL)(*inputs()), conditional)
    np.testing.assert_array_equal(guided(denoiser, 0.0, NULL)(*inputs())[..., :4], unconditional[..., :4])


def test_extrapolates_the_mean_and_keeps_the_variance():
    conditional, unconditional = halves(*inputs())
    got = guided(denoiser, 4.0, NULL)(*inputs())
    expected = unconditional + 4.0 * (conditional - unconditional)
    np.testing.assert_allclose(got[..., :4], expected[..., :4], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(got[..., 4:], conditional[..., 4:])


def test_three_of_four_channels():
    conditional, _ = halves(*inputs())
    all_of_them = guided(denoiser, 4.0, NULL)(*inputs())
    got = guided(denoiser, 4.0, NULL, channels=3)(*inputs())
    np.testing.assert_array_equal(got[..., :3], all_of_them[..., :3])
    np.testing.assert_array_equal(got[..., 3:], conditional[..., 3:])


def test_one_call_on_twice_the_batch():
    sizes = []

    def counting(x_t, t, label):
        sizes.append((x_t.shape[0], t.shape[0], label.shape[0]))
        return denoiser(x_t, t, label)

    guided(counting, 2.0, NULL)(*inputs())
    assert sizes == [(6, 6, 6)]


@pytest.mark.parametrize("channels", [0, 5])
def test_channels_the_picture_lacks(channels):
    with pytest.raises(UsageError, match=f"channels={channels}"):
        guided(denoiser, 2.0, NULL, channels=channels)(*inputs())
