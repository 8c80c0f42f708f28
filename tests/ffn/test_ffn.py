import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.errors import UsageError
from effjax.ffn.gated import Gated
from effjax.ffn.mlp import MLP

X = jax.random.normal(jax.random.key(0), (2, 3, 8))


def params_of(module):
    return meta.unbox(module.init(jax.random.key(1), X))


def test_mlp_is_its_equation():
    module = MLP(ratio=2.0, activation="relu")
    p = params_of(module)["params"]
    hidden = np.maximum(X @ p["expand"]["kernel"] + 0.0, 0)
    assert hidden.shape[-1] == 16
    np.testing.assert_allclose(module.apply({"params": p}, X), hidden @ p["contract"]["kernel"], atol=1e-5)


def test_gated_is_its_equation():
    module = Gated(hidden=12)
    p = params_of(module)["params"]
    gate, value = X @ p["gate"]["kernel"], X @ p["expand"]["kernel"]
    expected = (gate / (1 + np.exp(-gate)) * value) @ p["contract"]["kernel"]
    np.testing.assert_allclose(module.apply({"params": p}, X), expected, atol=1e-5)
    assert all(set(layer) == {"kernel"} for layer in p.values())


def test_computes_in_the_dtype_of_its_parameters():
    module = MLP()
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params_of(module))
    assert module.apply(half, X.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_an_unknown_activation_is_named():
    with pytest.raises(UsageError, match=r"activation is 'gleu'\. Did you mean 'gelu'"):
        params_of(MLP(activation="gleu"))
