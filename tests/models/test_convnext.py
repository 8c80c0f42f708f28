import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.vision.convnext import convnext
from effjax import models
from effjax.config import build_kind
from tests.models.test_pyramid import randomised

# Whole networks: the whole suite has time for them.
pytestmark = pytest.mark.slow


def toy(**changes):
    section = convnext(4, (1, 1, 1, 1), classes=5, kernel=3)
    return build_kind(models.KINDS, section | changes, "config.model")


@pytest.mark.slow
def test_a_shift_by_the_stride_of_the_trunk_shifts_its_map():
    """All four stages halve: 32 pixels are one place of the last map, away from the edges."""
    model = toy()
    images = jax.random.normal(jax.random.key(0), (1, 32 * 9, 32 * 8, 3))
    params = randomised(model, images)
    trunk = jax.jit(lambda images: model.apply(params, images, method="features")["stage_4"])
    here, there = trunk(images), trunk(jnp.roll(images, (32, 32), (1, 2)))
    # The last block sees one place, those before less: two places at the edges know where they end.
    inner = here[:, 2:-3, 2:-3]
    scale = float(jnp.abs(inner).max())
    np.testing.assert_allclose(there[:, 3:-2, 3:-2], inner, atol=1e-4 * scale)
    assert float(jnp.abs(there - jnp.roll(here, (1, 1), (1, 2))).max()) > 1e-3 * scale
    by_one = trunk(jnp.roll(images, (1, 1), (1, 2)))[:, 3:-2, 3:-2]
    assert float(jnp.abs(by_one - inner).max()) > 1e-2 * scale


def test_scales_of_zero_make_every_block_the_identity():
    model = toy()
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    variables = randomised(model, images)
    for stage in range(4):
        scale = variables["params"][f"stages_{stage}"]["stack"]["scale"]
        variables["params"][f"stages_{stage}"]["stack"]["scale"] = jnp.zeros_like(scale)
    maps = jax.jit(functools.partial(model.apply, method="features"))(variables, images)
    np.testing.assert_array_equal(maps["stage_1"], maps["stem"])
    flat = np.asarray(maps["stage_1"], np.float64)
    p = variables["params"]["stages_1"]["downsample"]
    normed = (flat - flat.mean(-1, keepdims=True)) / np.sqrt(flat.var(-1, keepdims=True) + 1e-6)
    normed = normed * np.asarray(p["norm"]["scale"]) + np.asarray(p["norm"]["bias"])
    cut = normed.reshape(2, 4, 2, 4, 2, 4).transpose(0, 1, 3, 2, 4, 5).reshape(2, 4, 4, 16)
    expected = cut @ np.asarray(p["embed"]["projection"]["kernel"]) + np.asarray(
        p["embed"]["projection"]["bias"]
    )
    np.testing.assert_allclose(maps["stage_2"], expected, atol=1e-4)


def test_a_hidden_layer_stands_in_front_of_the_classes():
    model = toy(head=dict(kind="linear", place="after_pool", hidden=7))
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    variables = randomised(model, images)
    pooled = model.clone(head=model.head.clone(hidden=None)).clone(classes=0).apply(variables, images)
    head = variables["params"]["head"]
    hidden = jax.nn.gelu(pooled @ head["hidden"]["kernel"] + head["hidden"]["bias"][None], approximate=False)
    expected = hidden @ head["classifier"]["kernel"] + head["classifier"]["bias"][None]
    np.testing.assert_allclose(model.apply(variables, images), expected, atol=1e-4)
