"""A ViT small enough to reduce in a test, and what the recorded originals need."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from effjax.config import build_kind
from effjax.interop import load_variables
from effjax.models import KINDS

FIXTURES = Path(__file__).parent / "fixtures"

IMAGES = jax.random.normal(jax.random.key(0), (2, 12, 12, 3))


def vit(**changes):
    """36 patches and a class token."""
    section = dict(
        kind="vit",
        patch=2,
        dim=24,
        depth=2,
        classes=5,
        block=dict(mixer=dict(kind="attention", heads=3), ffn=dict(kind="mlp")),
    )
    return build_kind(KINDS, section | changes, "config.model")


@functools.cache
def _drawn(changes):
    return meta.unbox(jax.jit(vit(**json.loads(changes)).init)(jax.random.key(1), IMAGES))


def params_of(**changes):
    """Parameters that are nowhere near a symmetry: everything, biases and head too, is random."""
    params = _drawn(json.dumps(changes))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    drawn = [leaf + 0.2 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, drawn)


def run(model, params, images=IMAGES, **options):
    """The outputs, compiled at once: operation by operation a test takes a minute."""
    return jax.jit(lambda params, images: model.apply(params, images, **options))(params, images)


def difference(a, b):
    """The largest difference, relative to the largest value of `b`."""
    return float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))


def recorded(name):
    """Returns a model and its parameters, pictures, and the original's outputs by name."""
    with np.load(FIXTURES / f"{name}.npz") as data:
        arrays = dict(data)
    weights = {key.removeprefix("weight/"): x for key, x in arrays.items() if key.startswith("weight/")}
    outputs = {key.removeprefix("output/"): x for key, x in arrays.items() if key.startswith("output/")}
    model, params = load_variables(str(arrays["source"]), weights, json.loads(str(arrays["config"])))
    return model, params, arrays["images"], outputs
