"""The band: equal to masked attention at every size, and to attention where it is wide enough."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.errors import UsageError
from effjax.measure import count
from effjax.mixers.attention import Attention
from effjax.mixers.context import Context
from effjax.mixers.sliding_window import SlidingWindow


def tokens(n, width=8):
    return jnp.float32(np.random.default_rng(n).normal(size=(2, n, width)))


def params_of(n):
    held = meta.unbox(jax.jit(Attention(2).init)(jax.random.key(0), tokens(n), Context()))
    return jax.tree.map(lambda leaf: 3 * leaf, held)


def run(mixer, n):
    return jax.jit(lambda p, x: mixer.apply(p, x, Context()))(params_of(n), tokens(n))


@pytest.mark.parametrize(("n", "radius"), [(5, 2), (40, 3), (64, 4), (70, 20), (33, 0)])
def test_it_is_attention_with_all_but_the_band_masked(n, radius):
    masked = run(Attention(2, window=radius + 1), n)
    np.testing.assert_allclose(run(SlidingWindow(2, radius), n), masked, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("n", [9, 40])
def test_a_window_as_wide_as_the_sequence_is_attention(n):
    np.testing.assert_array_equal(run(SlidingWindow(2, n - 1), n), run(Attention(2), n))


def test_work_grows_with_the_number_of_tokens():
    def macs(n):
        return count(lambda p, x: SlidingWindow(2, 4).apply(p, x, Context()), params_of(8), tokens(n)).macs

    assert macs(1024) == 2 * macs(512)


def test_gradients_are_those_of_masked_attention():
    def slope(mixer):
        loss = jax.jit(jax.grad(lambda p: jnp.sum(mixer.apply(p, tokens(40), Context()) ** 2)))
        return jax.tree.leaves(loss(params_of(40)))

    found, expected = slope(SlidingWindow(2, 3)), slope(Attention(2, window=4))
    # A bias of the keys has no gradient: what rounding leaves of it is compared with the largest of all.
    largest = max(float(jnp.abs(leaf).max()) for leaf in expected)
    for got, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-6 * largest)


def test_what_it_cannot_mix_is_refused():
    with pytest.raises(UsageError, match="heads=3"):
        SlidingWindow(3).init(jax.random.key(0), tokens(4), Context())
    with pytest.raises(UsageError, match="no segments"):
        SlidingWindow(2).init(jax.random.key(0), tokens(4), Context(segments=jnp.ones((2, 4), jnp.int32)))
