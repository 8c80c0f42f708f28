"""The published TokenFormer layer by layer, in NumPy and float64: its orders, scales and norms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from configs.language import tokenformer
from effjax.experiment import resolve

TOKENS = np.random.default_rng(1).integers(0, 256, size=11)
HEADS, TURNED, BASE = 4, 2, 1e4  # a quarter of the eight channels of a head is turned


def normal(x):
    """A layer norm without parameters."""
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


def pattention(x, p):
    """Scores to unit length times sqrt(n), the exact GELU, then the value tokens."""
    keys, values = (np.asarray(p[name]["kernel"], np.float64) for name in ("keys", "values"))
    scores = x @ keys.reshape(-1, keys.shape[-1])
    scores = scores / np.linalg.norm(scores, axis=-1, keepdims=True) * math.sqrt(scores.shape[-1])
    weights = scores * 0.5 * (1 + np.vectorize(math.erf)(scores / math.sqrt(2)))
    return weights @ values.reshape(len(values), -1)


def turned(x):
    """The first channels of every head turn, each with that half of them away."""
    angle = np.arange(len(x))[:, None] / BASE ** (np.arange(TURNED // 2) * 2 / TURNED)
    cos, sin = (np.concatenate([f(angle)] * 2, axis=1)[:, None] for f in (np.cos, np.sin))
    part = x[..., :TURNED]
    other = np.concatenate([-part[..., TURNED // 2 :], part[..., : TURNED // 2]], axis=-1)
    return np.concatenate([part * cos + other * sin, x[..., TURNED:]], axis=-1)


def by_hand(params):
    table = np.asarray(params["embedding"], np.float64)
    x = table[TOKENS]
    blocks = params["blocks"]
    for layer in range(2):
        p = jax.tree.map(lambda leaf, layer=layer: leaf[layer], blocks)
        h = normal(x)
        q, k, v = (
            pattention(h, p["mixer"][name]).reshape(len(x), HEADS, -1) for name in ("query", "key", "value")
        )
        logits = np.einsum("nhd,mhd->hnm", turned(q), turned(k)) / math.sqrt(q.shape[-1])
        logits = np.where(np.tri(len(x), dtype=bool), logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        mixed = np.einsum("hnm,mhd->nhd", weights / weights.sum(-1, keepdims=True), v).reshape(len(x), -1)
        x = x + pattention(mixed, p["mixer"]["output"])
        x = x + pattention(normal(x), p["ffn"]["pattention"])
    x = normal(x) * np.asarray(params["norm"]["scale"]) + np.asarray(params["norm"]["bias"])
    return x @ table.T


def test_logits_are_those_of_the_published_layers(draw):
    model = resolve(tokenformer.get_config("smoke")).model
    tokens = jnp.asarray(TOKENS)[None]
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens))
    variables = jax.tree.map(lambda leaf: jnp.float32(0.3 * draw.normal(size=leaf.shape)), shapes)
    found = jax.jit(model.apply)(variables, tokens)[0]
    np.testing.assert_allclose(found, by_hand(variables["params"]), rtol=2e-4, atol=2e-4)
