import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.layers.squeeze_excite import SqueezeExcite


def values(module, shape=(2, 3, 4, 8), seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    x = jax.random.normal(keys[0], shape)
    variables = jax.tree.map(
        lambda leaf: jax.random.normal(keys[1], leaf.shape), jax.eval_shape(module.init, keys[1], x)
    )
    return x, variables


def parameters(variables):
    return meta.unbox(variables)["params"]


@pytest.mark.parametrize("gate", ["sigmoid", "hard_sigmoid"])
def test_every_channel_is_weighed_by_what_the_map_holds(gate):
    x, variables = values(SqueezeExcite(gate=gate))
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), parameters(variables))
    pooled = np.asarray(x, np.float64).mean((1, 2))  # [B, C]
    h = np.maximum(pooled @ p["reduce"]["kernel"] + p["reduce"]["bias"], 0)
    z = h @ p["expand"]["kernel"] + p["expand"]["bias"]
    weights = 1 / (1 + np.exp(-z)) if gate == "sigmoid" else np.clip(z / 6 + 0.5, 0, 1)
    expected = np.asarray(x) * weights[:, None, None]
    y = SqueezeExcite(gate=gate).apply(variables, x)
    assert np.abs(np.asarray(y) - expected).max() < 1e-5


@pytest.mark.parametrize(("options", "hidden"), [({}, 2), (dict(ratio=0.5), 4), (dict(hidden=3), 3)])
def test_the_channels_between(options, hidden):
    _, variables = values(SqueezeExcite(**options))
    assert parameters(variables)["reduce"]["kernel"].shape == (8, hidden)


def test_one_place_is_its_own_mean():
    x, variables = values(SqueezeExcite(), shape=(2, 1, 1, 8))
    tiled = jnp.tile(x, (1, 3, 5, 1))
    module = SqueezeExcite()
    one, many = module.apply(variables, x), module.apply(variables, tiled)
    assert np.allclose(one, many[:, :1, :1], atol=1e-6)
