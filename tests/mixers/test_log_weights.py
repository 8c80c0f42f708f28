import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.errors import UsageError
from effjax.mixers.cross_attention import CrossAttention
from effjax.mixers.log_weights import from_codes, log_codes, log_rounded, prompt_scale


def weights(draw, largest=1.0):
    """Attention of which the first token takes most."""
    logits = draw.normal(size=(2, 3, 6, 9)) * 2
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True) * largest
    p[..., 0] = 1 - p[..., 1:].sum(-1)
    return jnp.asarray(p, jnp.float32)


def test_a_weight_is_off_by_half_a_power_and_the_first_token_by_nothing(draw):
    p = weights(draw)
    q = jax.jit(log_rounded, static_argnums=1)(p, 6)
    np.testing.assert_array_equal(q[..., 0], p[..., 0])
    ratio = np.asarray(q[..., 1:] / p[..., 1:], np.float64)
    assert ratio.max() <= 2**0.5 + 1e-5
    assert ratio.min() >= 2**-0.5 - 1e-5
    np.testing.assert_array_equal(q[..., 1:].max((1, 2, 3)), p[..., 1:].max((1, 2, 3)))


def test_nothing_stays_nothing(draw):
    p = weights(draw).at[:, :, :, 4].set(0.0)
    q = log_rounded(p, 3)
    assert jnp.all(q[..., 4] == 0)
    assert jnp.all(jnp.isfinite(q))
    codes = log_codes(p[..., 1:], prompt_scale(p), 3)
    assert codes.max() == 7
    assert codes.dtype == jnp.uint8
    alone = jnp.zeros((1, 1, 2, 5)).at[..., 0].set(1.0)
    np.testing.assert_array_equal(log_rounded(alone, 4), alone)
    np.testing.assert_array_equal(log_rounded(alone[..., :1], 4), alone[..., :1])


def test_the_scale_of_the_prompt_beats_one_for_all_where_maxima_differ_tenfold(draw):
    p = jnp.concatenate([weights(draw), weights(draw, 0.1)])[..., 1:]
    own = jnp.max(p, axis=(1, 2, 3), keepdims=True)
    one = jnp.broadcast_to(own.max(), own.shape)

    def error(scale):
        return jnp.mean(((from_codes(log_codes(p, scale, 3), scale, 3) - p) / own) ** 2)

    assert error(own) < 0.8 * error(one)


def test_cross_attention_reads_with_rounded_weights(draw):
    x, memory = (jnp.asarray(draw.normal(size=(2, n, 8)), jnp.float32) for n in (5, 7))
    plain = CrossAttention(2)
    variables = plain.init(jax.random.key(0), x, memory)
    exact, close, coarse = (
        jax.jit(CrossAttention(2, log_bits=bits).apply)(variables, x, memory) for bits in (None, 8, 2)
    )
    error = [float(jnp.sqrt(jnp.mean((y - exact) ** 2)) / jnp.std(exact)) for y in (close, coarse)]
    assert 0 < error[0] < error[1]
    with pytest.raises(UsageError, match="log_bits=9"):
        CrossAttention(2, log_bits=9).apply(variables, x, memory)
