"""What holds for every image classifier: the toy of each config, and what may be asked of it."""

import functools
import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.errors import UsageError
from effjax.experiment import resolve
from effjax.models import Pyramid
from effjax.models.sparseformer import SparseFormer

FOLDER = Path(__file__).parents[2] / "configs" / "vision"
NAMES = sorted(file.stem for file in FOLDER.glob("*.py") if file.stem not in ("__init__", "recipes"))
# On the digits' 8 x 8 pixels LowFormer's keys come from one place, to which queries make no difference.
SIDES = {"lowformer": 16}
REFUSALS = {"lsnet": "set side=5"}
# No gradient goes through the encoding of its boxes, as published; its own test has the rest.
STOPPED = ("sparseformer",)


@functools.cache
def model_of(name):
    return resolve(importlib.import_module(f"configs.vision.{name}").get_config("smoke")).model


@functools.cache
def images_of(name):
    side = SIDES.get(name, 8)
    return jax.random.normal(jax.random.key(3), (4, side, side, 1))


@functools.cache
def variables_of(name):
    """Parameters away from their initial values, where scales and heads are often zero."""
    held = meta.unbox(jax.jit(model_of(name).init)(jax.random.key(0), images_of(name)))
    leaves, tree = jax.tree.flatten(held["params"])
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [leaf + 0.1 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)]
    return {**held, "params": jax.tree.unflatten(tree, moved)}


@functools.cache
def run(name):
    return jax.jit(model_of(name).apply)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_stays_near_float32(name):
    images = images_of(name)
    held = variables_of(name)
    half = {**held, "params": jax.tree.map(lambda a: a.astype(jnp.bfloat16), held["params"])}
    full = run(name)(
        {**held, "params": jax.tree.map(lambda a: a.astype(jnp.float32), half["params"])}, images
    )
    low = run(name)(half, images.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), full, atol=2e-2 * float(jnp.abs(full).max()))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_parameter_and_are_those_of_finite_differences(name):
    images = images_of(name)
    model, held = model_of(name), variables_of(name)
    others = {collection: held[collection] for collection in held if collection != "params"}
    target = jax.random.normal(jax.random.key(5), (len(images), model.classes))

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        logits = model.apply({"params": params, **others}, images)
        return -jnp.mean(jnp.sum(target * jax.nn.log_softmax(logits), axis=-1))

    params = held["params"]
    _, gradient = loss(params)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))
    dead = [jax.tree_util.keystr(p) for p, g in jax.tree.leaves_with_path(gradient) if not jnp.any(g)]
    # A progressive norm has left its layer norm behind in evaluation.
    assert [path for path in dead if "['before']" not in path] == []
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient)))
    if name in STOPPED:
        return
    step = 1e-2 / float(norm)
    ahead, behind = (
        loss(jax.tree.map(lambda p, g, s=sign: p + s * step / norm * g, params, gradient))[0]
        for sign in (1, -1)
    )
    np.testing.assert_allclose((ahead - behind) / (2 * step), norm, rtol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_examples_do_not_touch_each_other_in_evaluation(name):
    images = images_of(name)
    held = variables_of(name)
    whole = run(name)(held, images)
    near = 1e-4 * float(jnp.abs(whole).max())
    np.testing.assert_allclose(run(name)(held, images[::-1]), whole[::-1], atol=near)
    others = run(name)(held, images.at[0].set(0.0))
    np.testing.assert_allclose(others[1:], whole[1:], atol=near)
    mapped = jax.jit(jax.vmap(lambda image: model_of(name).apply(held, image[None])[0]))(images)
    np.testing.assert_allclose(mapped, whole, atol=near)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_another_size_of_picture(name):
    """A pyramid takes odd ones too, and so does what samples points; where a table of positions is made for
    one size, others are refused in words."""
    images = jax.random.normal(jax.random.key(4), (2, 9, 7, 1))
    if isinstance(model_of(name), Pyramid | SparseFormer) and name not in REFUSALS:
        logits = run(name)(variables_of(name), images)
        assert logits.shape == (2, 10)
        assert bool(jnp.isfinite(logits).all())
    else:
        with pytest.raises(UsageError, match=REFUSALS.get(name, "resize")):
            run(name)(variables_of(name), images)
