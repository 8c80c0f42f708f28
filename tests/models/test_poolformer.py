import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from configs.vision.poolformer import ABLATIONS, metaformer
from effjax import models
from effjax.config import build_kind
from effjax.experiment import resolve
from effjax.models.blocks.metaformer import Block
from tests.models.test_pyramid import randomised

# Whole networks: the whole suite has time for them.
pytestmark = pytest.mark.slow

IMAGES = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))


def test_the_block_is_the_equation():
    """Norms over the whole map, the mean of neighbours less the map, both branches scaled."""
    model = build_kind(models.KINDS, metaformer((1,), (4,), classes=3), "config.model")
    variables = randomised(model, IMAGES)
    maps = jax.jit(functools.partial(model.apply, method="features"))(variables, IMAGES)
    block = jax.tree.map(lambda a: np.asarray(a[0], np.float64), variables["params"]["stages_0"]["stack"])
    x = np.asarray(maps["stem"], np.float64)

    def norm(x, p):
        y = (x - x.mean((1, 2, 3), keepdims=True)) / np.sqrt(x.var((1, 2, 3), keepdims=True) + 1e-5)
        return y * p["scale"] + p["bias"]

    h = norm(x, block["mixer_norm"])
    pooled = np.zeros_like(h)
    for i, j in np.ndindex(*h.shape[1:3]):
        pooled[:, i, j] = h[:, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].mean((1, 2))
    x = x + block["mixer_scale"] * (pooled - h)
    h = norm(x, block["ffn_norm"]) @ block["ffn"]["expand"]["kernel"] + block["ffn"]["expand"]["bias"]
    h = np.asarray(jax.nn.gelu(jnp.float32(h), approximate=False), np.float64)
    x = x + block["ffn_scale"] * (h @ block["ffn"]["contract"]["kernel"] + block["ffn"]["contract"]["bias"])
    np.testing.assert_allclose(maps["stage_1"], x, atol=1e-4 * np.abs(x).max())


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_every_ablation_trains(ablation):
    section = metaformer((1, 1, 1, 1), (16, 16, 20, 32), classes=3, **ABLATIONS[ablation])
    model = build_kind(models.KINDS, section, "config.model")

    def step(key):
        held = meta.unbox(model.init(key, IMAGES))
        return held, model.apply(held, IMAGES, train=True, mutable=["batch_stats", "constants"])

    held, (logits, changed) = jax.eval_shape(step, jax.random.key(0))
    assert logits.shape == (2, 3)
    assert changed.keys() == held.keys() - {"params"}
    assert ("constants" in held) == (ablation == "random")
    assert ("batch_stats" in held) == (ablation == "batch")


def test_mixers_are_pluggable():
    """What the ablation changes is the mixer alone."""
    config = importlib.import_module("configs.vision.poolformer").get_config("s12-attention2")
    mixers = [type(stage.blocks[0].mixer).__name__ for stage in resolve(config).model.stages]
    assert mixers == ["Pooling", "Pooling", "Attention", "Attention"]
    assert all(isinstance(stage.blocks[0], Block) for stage in resolve(config).model.stages)
