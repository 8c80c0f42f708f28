import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.errors import UsageError
from effjax.layers.depthwise import DepthwiseConv
from effjax.measure import count
from effjax.mixers import SimplifiedLinear
from effjax.mixers.context import Context
from effjax.mixers.simplified_linear import linear_attention


def features(n=10, m=10, d=3):
    draw = np.random.default_rng(0)
    q, k, v = (draw.normal(size=(2, length, 2, d)) for length in (n, m, m))
    return np.maximum(q, 0), np.maximum(k, 0), v


@pytest.mark.parametrize("places", [4, 40])
def test_both_orders_equal_the_matrix_of_all_pairs(places):
    """With three channels a head, 4 places take the matrix of pairs and 40 the product of keys and values."""
    q, k, v = features(places, places)
    pairs = np.einsum("bnhd,bmhd->bhnm", q, k)
    expected = np.einsum("bhnm,bmhd->bnhd", pairs / (pairs.sum(-1, keepdims=True) + 1e-6), v)
    got = linear_attention(*map(jnp.float32, (q, k, v)), 1e-6)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_weights_of_a_query_sum_to_one_unless_it_meets_no_key():
    q, k, v = features(12, 12)
    q[:, 0] = 0.0
    sums = linear_attention(jnp.float32(q), jnp.float32(k), jnp.ones(v.shape), 1e-6)[..., 0]
    met = np.einsum("bnhd,bmhd->bnh", q, k) > 0
    np.testing.assert_allclose(sums, met.astype(np.float32), atol=1e-4)
    assert not met.all()
    slope = jax.grad(lambda q: linear_attention(q, jnp.float32(k), jnp.float32(v), 1e-6).sum())(
        jnp.float32(q)
    )
    assert jnp.isfinite(slope).all()


def test_work_is_linear_in_the_number_of_places():
    mixer = SimplifiedLinear(heads=2)

    def macs(side):
        x = jax.ShapeDtypeStruct((1, side, side, 16), jnp.float32)
        held = meta.unbox(jax.eval_shape(mixer.init, jax.random.key(0), x, Context()))
        return count(lambda v, x: mixer.apply(v, x, Context()), held, x).macs

    assert macs(32) == 4 * macs(16)


def test_tokens_need_their_grid_and_maps_their_size():
    mixer = SimplifiedLinear(heads=2)
    x = jax.random.normal(jax.random.key(0), (1, 12, 8))
    held = meta.unbox(mixer.init(jax.random.key(1), x, Context(grid=(3, 4))))
    as_map = mixer.apply(held, x.reshape(1, 3, 4, 8), Context())
    np.testing.assert_allclose(
        mixer.apply(held, x, Context(grid=(3, 4))), as_map.reshape(1, 12, 8), rtol=1e-6
    )
    with pytest.raises(UsageError, match="12 tokens are no grid of None"):
        mixer.apply(held, x, Context())
    with pytest.raises(UsageError, match="the code of places holds 12 and this map has 16"):
        mixer.apply(held, jnp.zeros((1, 4, 4, 8)), Context())
    with pytest.raises(UsageError, match="heads=3 does not divide"):
        SimplifiedLinear(heads=3).init(jax.random.key(0), x, Context(grid=(3, 4)))


def test_the_convolution_of_cswin_is_added():
    x = jax.random.normal(jax.random.key(0), (1, 4, 4, 4))
    plain, both = SimplifiedLinear(heads=2), SimplifiedLinear(heads=2, lepe=True)
    shapes = meta.unbox(jax.eval_shape(both.init, jax.random.key(1), x, Context()))["params"]
    draw = np.random.default_rng(2)
    held = jax.tree.map(lambda s: np.float32(draw.normal(size=s.shape)), shapes)
    held["output"] = {"kernel": np.eye(4, dtype=np.float32).reshape(2, 2, 4), "bias": np.zeros(4)}

    @jax.jit
    def parts(held, x):
        rest = {name: value for name, value in held.items() if name != "lepe"}
        values = (
            jnp.einsum("bhwc,cid->bhwid", x, held["value"]["kernel"])
            + held["value"]["bias"][None, None, None]
        )
        alone = DepthwiseConv(3).apply({"params": held["lepe"]}, values.reshape(x.shape))
        return *(m.apply({"params": p}, x, Context()) for m, p in ((both, held), (plain, rest))), alone

    whole, without, alone = parts(held, x)
    np.testing.assert_allclose(whole - without, alone, rtol=1e-4, atol=1e-5)
    assert jnp.abs(alone).max() > 0.1
