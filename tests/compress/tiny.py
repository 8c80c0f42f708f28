"""Tiny networks that steps of a recipe are tried on."""

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from effjax.compress.subject import Subject
from effjax.config import build_kind
from effjax.experiment import resolve
from effjax.models import KINDS
from effjax.train.tasks.language import Language
from tests.train.toy import smoke

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 16, (2, 12)), jnp.int32)
BATCH = {
    "tokens": TOKENS,
    "targets": TOKENS,
    "positions": jnp.broadcast_to(jnp.arange(12)[None], (2, 12)),
    "segments": jnp.ones((2, 12), jnp.int32),
    "weights": jnp.ones((2, 12)),
    "mask": jnp.ones(2),
}


def language(**block):
    """A language model of two layers, width 16, with random weights."""
    mixer = dict(kind="attention", heads=2, kv_heads=1, rotary_base=1e4, causal=True)
    block = dict(mixer=mixer, ffn=dict(kind="gated", hidden=32)) | block
    section = dict(kind="lm", block=block, vocab=16, dim=16, depth=2, max_length=16)
    task = Language(model=build_kind(KINDS, section, "config.model"))
    return Subject(task, meta.unbox(jax.jit(task.init)(jax.random.key(0), BATCH)), BATCH)


def pictures(family, **changes):
    """The smoke config of "vision" or "diffusion", with random weights, and a batch of its training data."""
    task = resolve(smoke(family, **changes)).task
    draw = np.random.default_rng(0)
    image = jnp.asarray(draw.normal(size=(2, 8, 8, 1)), jnp.float32)
    batch = {"image": image, "label": jnp.asarray([0, 1], jnp.int32)}
    params = meta.unbox(jax.jit(task.init)(jax.random.key(0), batch))
    # Gates that start at zero would leave the blocks of a diffusion transformer nothing to give.
    noise = iter(jax.random.split(jax.random.key(1), 200))
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(next(noise), leaf.shape), params)
    return Subject(task, params, batch), batch
