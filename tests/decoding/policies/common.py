"""A toy, and what it writes step by step under a policy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from effjax.config import build
from effjax.models.lm import LM

BLOCK = dict(
    mixer=dict(
        kind="attention", heads=4, kv_heads=2, qkv_bias=False, out_bias=False, rotary_base=1e4, causal=True
    ),
    ffn=dict(kind="gated", hidden=24),
)


def toy(cache=None, **fields) -> LM:
    return build(LM, dict(block=BLOCK, vocab=17, dim=16, depth=2) | fields, "model").clone(cache=cache)


@functools.cache
def variables():
    # Logits of a fresh model hardly differ: larger weights tell attention apart.
    held = jax.jit(toy().init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    return jax.tree.map(lambda leaf: leaf * (6.0 if leaf.ndim > 2 else 1.0), held)


def stepwise(model, tokens, first, lengths=None, slots=None):
    """Logits from the token before `first` on, the caches, and what `first` tokens at once left in them."""
    tokens = jnp.asarray(tokens)
    rows, size = tokens.shape
    padding = np.zeros(rows, int) if lengths is None else size - np.asarray(lengths)
    positions = jnp.asarray(np.arange(size)[None] - padding[:, None], jnp.int32)

    @jax.jit
    def run(held):
        caches = model.init_cache(rows, slots or size)
        step = functools.partial(model.apply, held, method="step")
        before, caches = step(tokens[:, :first], caches, positions[:, :first])

        def one(caches, place):
            at = lambda array: jax.lax.dynamic_slice_in_dim(array, place, 1, axis=1)
            logits, caches = step(at(tokens), caches, at(positions))
            return caches, logits[:, 0]

        after, logits = jax.lax.scan(one, caches, jnp.arange(first, size))
        return jnp.concatenate([before[:, -1:], logits.swapaxes(0, 1)], axis=1), after, caches

    return run(variables())


def plain_look(query, positions, groups):
    """A mixer's look: causal attention of queries `[B, N, H, D]`, unscaled."""
    heads = query.shape[2]

    def look(keys, values, held, size=None, among=None, tell=False, part=None):
        q, at = query, positions
        if part is not None:
            q, at = (jax.lax.dynamic_slice_in_dim(whole, *part, axis=1) for whole in (q, at))
        held = held if held.ndim == 3 else held[:, :, None]
        allowed = (held[:, None] >= 0) & (held[:, None] <= at[:, :, None, None])  # [B, N, S, 1 or G]
        shared = q.reshape(*q.shape[:2], groups, heads // groups, -1)
        logits = jnp.einsum("bnghd,bsgd->bghns", shared, keys)
        logits = jnp.where(jnp.moveaxis(allowed, 3, 1)[:, :, None], logits, -1e30)
        weights = jax.nn.softmax(logits)
        y = jnp.einsum("bghns,bsgd->bnghd", weights, values).reshape(q.shape)
        return y, weights.reshape(q.shape[0], heads, q.shape[1], -1) if tell else None

    return look
