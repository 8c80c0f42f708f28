"""Published MACs of neighbourhood attention count neighbours; here the other keys of a tile count too."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax.core import meta

from configs.vision.dinat import get_config
from effjax.experiment import resolve
from effjax.measure import count
from effjax.mixers.neighborhood import neighborhood_attention

# Whole networks: the whole suite has time for them.
pytestmark = pytest.mark.slow

# The authors' tables, in GMACs, as their repository gives them.
PUBLISHED = {
    "mini": 2.7,
    "tiny": 4.3,
    "small": 7.8,
    "base": 13.7,
    "nat-mini": 2.7,
    "nat-tiny": 4.3,
    "nat-small": 7.8,
    "nat-base": 13.7,
    "large": 30.6,
    "large-384": 89.7,
    "large-384-11": 92.4,
}


@functools.cache
def attention(side, channels, heads, kernel, dilation):
    """MACs of the attention of one block: as it runs, and of neighbours alone."""
    q = jax.ShapeDtypeStruct((1, side, side, heads, channels // heads), jnp.float32)
    table = jax.ShapeDtypeStruct((2 * kernel - 1, 2 * kernel - 1, heads), jnp.float32)

    def attend(q, table):
        return neighborhood_attention(q, q, q, kernel=kernel, dilation=dilation, table=table)

    return count(attend, q, table, parameters=None).macs, 2 * side**2 * kernel**2 * channels


@pytest.mark.slow
@pytest.mark.parametrize("variant", PUBLISHED)
def test_macs_are_the_published_ones_when_neighbours_alone_count(variant):
    side = 384 if "384" in variant else 224
    model = resolve(get_config(variant)).model
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    params = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), images))["params"]
    macs = count(lambda params, x: model.apply({"params": params}, x), params, images).macs
    for i, stage in enumerate(model.stages):
        for j in range(stage.depth):
            mixer = stage.blocks[j % len(stage.blocks)].mixer
            grid = side // 4 // 2**i
            runs, needs = attention(grid, stage.dim, mixer.heads, mixer.kernel, mixer.dilation)
            assert runs >= needs
            macs += needs - runs
    assert macs == pytest.approx(PUBLISHED[variant] * 1e9, rel=0.02)
