import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.errors import UsageError
from effjax.mixers.context import Context
from effjax.mixers.conv_query import ConvQueryAttention
from effjax.mixers.position_bias import DistanceTable

X = jax.random.normal(jax.random.key(0), (2, 3, 4, 8))


def test_without_queries_every_place_gets_the_mean_value():
    mixer = ConvQueryAttention(heads=2, key_dim=3)
    variables = jax.tree.map(jnp.ones_like, meta.unbox(mixer.init(jax.random.key(1), X, Context())))
    params = variables["params"]
    params["qkv"]["conv"]["kernel"] = jax.random.normal(jax.random.key(2), (8, 20)).at[:, :6].set(0.0)
    params["qkv"]["norm"]["bias"] = jnp.zeros(20)
    params["query"]["norm"]["bias"] = jnp.zeros(6)
    variables["batch_stats"] = jax.tree.map(jnp.zeros_like, variables["batch_stats"])
    for name in ("qkv", "query", "output"):
        statistics = variables["batch_stats"][name]["norm"]
        statistics["var"] = jnp.full_like(statistics["var"], 1 - 1e-5)
    values = jnp.mean(X, (1, 2)) @ params["qkv"]["conv"]["kernel"][:, 12:]  # [B, C]
    expected = jax.nn.relu(values) @ params["output"]["conv"]["kernel"] + 1
    y = mixer.apply(variables, X, Context())
    np.testing.assert_allclose(y, jnp.broadcast_to(expected[:, None, None], X.shape), rtol=1e-4, atol=1e-4)


def test_biases_know_distances_along_both_axes_and_no_signs():
    table = jnp.arange(16.0)[:, None]
    bias = DistanceTable().apply({"params": {"table": table}}, (3, 4), (4, 4), 1)[0]  # [12, 12]
    for q, k in np.ndindex(12, 12):
        (i, j), (m, n) = divmod(q, 4), divmod(k, 4)
        assert bias[q, k] == 4 * abs(i - m) + abs(j - n)


def test_it_begins_as_zero_and_refuses_what_does_not_fit():
    mixer = ConvQueryAttention(heads=2)
    variables = mixer.init(jax.random.key(1), X, Context())
    assert not jnp.any(mixer.apply(variables, X, Context()))
    with pytest.raises(UsageError, match=r"3 x 4 is larger than side=3.*set side=4"):
        ConvQueryAttention(heads=2, side=3).init(jax.random.key(1), X, Context())
    with pytest.raises(UsageError, match="heads=3 does not divide the width 8"):
        ConvQueryAttention(heads=3).init(jax.random.key(1), X, Context())
