"""Small networks of every kind that structures are taken out of, with random weights, none of them zero."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from configs.vision.swin import swin
from effjax.compress.subject import Subject
from effjax.config import build_kind
from effjax.models import KINDS
from effjax.train.tasks.classification import Classification
from tests.compress import tiny


@functools.cache
def subject(name):
    """A network by name: vit, dit, lm, lm_pairs, swin."""
    if name == "vit":
        made = tiny.pictures("vision")[0]
    elif name == "dit":
        made = tiny.pictures("diffusion")[0]
    elif name.startswith("lm"):
        pairs = "neighbours" if name == "lm_pairs" else "halves"
        mixer = dict(kind="attention", heads=4, kv_heads=2, head_dim=8, rotary_base=1e4, causal=True)
        made = tiny.language(mixer=dict(mixer, rotary_pairs=pairs))
    else:
        model = swin(16, (3, 1), window=2, patch=1, head_dim=4, classes=5, drop_path=0.0)
        batch = {"image": jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 1)), jnp.float32),
                 "label": jnp.asarray([0, 1], jnp.int32)}  # fmt: skip
        task = Classification(model=build_kind(KINDS, model, "config.model"))
        made = Subject(task, meta.unbox(jax.jit(task.init)(jax.random.key(0), batch)), batch)
    return made.with_params(noisy(made.params))


def noisy(params):
    """No leaf is left as it starts."""
    keys = iter(jax.random.split(jax.random.key(2), 500))
    return jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(next(keys), leaf.shape), params)
