import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.errors import UsageError
from effjax.mixers import KINDS
from effjax.mixers.attention import Attention
from effjax.mixers.context import Context
from effjax.mixers.identity import Identity
from effjax.mixers.spatial import RandomMatrix, SpatialFC

X = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))


def flat(x):
    return np.asarray(x, np.float64).reshape(2, 12, 5)


def test_a_matrix_over_places_is_the_same_for_every_channel():
    rng = np.random.default_rng(1)
    kernel, bias = rng.normal(size=(12, 12)), rng.normal(size=12)
    params = {"kernel": jnp.float32(kernel), "bias": jnp.float32(bias)}
    y = SpatialFC().apply({"params": params}, X, Context())
    expected = np.einsum("bnc,nm->bmc", flat(X), kernel) + bias[None, :, None]
    np.testing.assert_allclose(flat(y), expected, atol=1e-5)


def test_a_random_matrix_takes_averages_and_is_no_parameter():
    held = meta.unbox(RandomMatrix().init(jax.random.key(2), X, Context()))
    assert list(held) == ["constants"]
    matrix = held["constants"]["matrix"]
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0, rtol=1e-5)
    assert float((matrix.max(axis=1) / matrix.min(axis=1)).max()) <= np.e
    assert float(matrix.std()) > 0.01
    y = RandomMatrix().apply(held, X, Context())
    np.testing.assert_allclose(flat(y), np.einsum("mn,bnc->bmc", matrix, flat(X)), atol=1e-5)


def test_a_random_matrix_stays_through_training():
    held = RandomMatrix().init(jax.random.key(2), X, Context())
    _, after = RandomMatrix().apply(held, X, Context(), train=True, mutable=["constants"])
    np.testing.assert_array_equal(after["constants"]["matrix"], held["constants"]["matrix"])


def test_a_map_of_another_size_is_refused():
    held = RandomMatrix().init(jax.random.key(2), X, Context())
    with pytest.raises(UsageError, match="12 places cannot mix a map of 9"):
        RandomMatrix().apply(held, X[:, :, :3], Context())


def test_no_mixing_at_all():
    np.testing.assert_array_equal(Identity().apply({}, X, Context()), X)


def test_attention_on_a_map_is_attention_among_its_places():
    attention = Attention(heads=1)
    held = attention.init(jax.random.key(3), X, Context())
    y = attention.apply(held, X, Context())
    np.testing.assert_allclose(flat(y), attention.apply(held, X.reshape(2, 12, 5), Context()), atol=1e-6)
    turned = attention.apply(held, X.transpose(0, 2, 1, 3), Context())
    np.testing.assert_allclose(turned, y.transpose(0, 2, 1, 3), atol=1e-5)


def test_all_stand_in_the_table():
    assert {"identity", "random_matrix", "spatial_fc", "pooling", "depthwise", "focal_modulation"} <= set(
        KINDS
    )
