"""Guidance of a denoiser that depends on all of its inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.diffusion.denoiser import Denoiser, memoryless
from effjax.diffusion.guidance import guided
from effjax.errors import UsageError

NULL = 9


def network(x_t, t, label):
    """Depends on all of its inputs, with a second half of channels for the variance."""
    shift = (label.astype(jnp.float32) + t)[:, None, None, None]
    return jnp.concatenate([jnp.sin(x_t + shift), jnp.cos(x_t * shift)], axis=-1)


def null(label):
    return jnp.full_like(label, NULL)


def guide(scale, network=network, **options):
    """A guided prediction, as a function of `inputs()`."""
    predict = guided(memoryless(network), scale, null, **options).predict
    return lambda x, t, label: predict(x, t, label, None)[0]


def inputs():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 2, 4)), jnp.float32)
    return x, jnp.array([1.0, 2.0, 3.0]), jnp.array([0, 4, 7])


def halves(x, t, label):
    return network(x, t, label), network(x, t, null(label))


def test_scales_0_and_1_are_exact():
    conditional, unconditional = halves(*inputs())
    np.testing.assert_array_equal(guide(1.0)(*inputs()), conditional)
    np.testing.assert_array_equal(guide(0.0)(*inputs())[..., :4], unconditional[..., :4])


def test_extrapolates_the_mean_and_keeps_the_variance():
    conditional, unconditional = halves(*inputs())
    got = guide(4.0)(*inputs())
    expected = unconditional + 4.0 * (conditional - unconditional)
    np.testing.assert_allclose(got[..., :4], expected[..., :4], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(got[..., 4:], conditional[..., 4:])


def test_three_of_four_channels():
    conditional, _ = halves(*inputs())
    all_of_them = guide(4.0)(*inputs())
    got = guide(4.0, channels=3)(*inputs())
    np.testing.assert_array_equal(got[..., :3], all_of_them[..., :3])
    np.testing.assert_array_equal(got[..., 3:], conditional[..., 3:])


def counting():
    """A network that notes the size of the batch at every call, and its notes."""
    sizes = []

    def call(x_t, t, label):
        jax.debug.callback(lambda: sizes.append(x_t.shape[0]))
        return network(x_t, t, label)

    return call, sizes


def test_one_call_on_twice_the_batch():
    call, sizes = counting()
    guide(2.0, call)(*inputs())
    jax.effects_barrier()
    assert sizes == [6]


@pytest.mark.parametrize("channels", [0, 5])
def test_channels_the_picture_lacks(channels):
    with pytest.raises(UsageError, match=f"channels={channels}"):
        guide(2.0, channels=channels)(*inputs())


def test_an_interval_guides_the_examples_in_it():
    conditional, _ = halves(*inputs())
    everywhere, got = guide(4.0)(*inputs()), guide(4.0, interval=(1.5, 2.0))(*inputs())
    np.testing.assert_allclose(got[1], everywhere[1], rtol=1e-6)  # t = 2 of 1, 2, 3
    np.testing.assert_allclose(got[::2], conditional[::2], rtol=1e-6)


def test_outside_of_the_interval_only_the_batch_itself_is_computed():
    call, sizes = counting()
    conditional, _ = halves(*inputs())
    np.testing.assert_allclose(guide(4.0, call, interval=(7.0, 8.0))(*inputs()), conditional, rtol=1e-6)
    jax.effects_barrier()
    assert sizes == [3]


def test_an_empty_interval():
    with pytest.raises(UsageError, match="least time that is not above"):
        guide(2.0, interval=(2.0, 1.0))


def test_a_memory_is_the_doubled_batch_and_travels_along():
    def predict(x_t, t, label, memory):
        return network(x_t, t, label) + memory.sum(), memory + label[:, None]

    denoiser = guided(Denoiser(predict, lambda x, t, label: 0.5 * label[:, None]), 2.0, null)
    x, t, label = inputs()
    memory = denoiser.start(x, t, label)
    np.testing.assert_array_equal(memory[:, 0], [0, 4.5, 2, 4.5, 3.5, 4.5])
    _, after = denoiser.predict(x, t, label, memory)
    np.testing.assert_array_equal(after, 3 * memory)
