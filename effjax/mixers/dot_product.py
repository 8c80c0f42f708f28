"""Softmax over dot products of queries and keys.

    y_n = sum_s p_ns v_s,    p_n = softmax(cap(scale q_n k_s + bias_ns) where s is allowed)

`cap(l) = c tanh(l / c)` bounds the logits where a model asks for it: Gemma 2, 2024.

A row of the softmax needs no other row. Where all logits together would be large, queries so take turns in
blocks, forward and backward: memory grows with the keys, and the numbers are the same. Where a mesh cuts the
sequence, each device has turns of its own queries, and all keys.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from effjax.parallel.each_device import Names, on_each_device

# Of a head, logits that stand in memory together: those of 8192 queries and keys, 256 MB. More than that come
# in blocks of so many queries: 16 MB a head at 16,384 keys.
LOGITS_AT_ONCE = 2**26
BLOCK = 256
# The logit of a key that a query does not see.
_NEVER = -0.7 * float(np.finfo(np.float32).max)


def band(length: int, window: Int[Array, ""], causal: bool) -> Bool[Array, "1 1 n n"]:
    """Which keys (last axis) lie within the window of each query."""
    distance = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]  # query - key
    if not causal:
        distance = jnp.abs(distance)
    return (distance < window)[None, None]


def softmax_attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g e"],
    *,
    mask: Bool[Array, "#b #h #n s"] | None,
    causal: bool,
    bias: Float[Array, "#b #h #n s"] | None = None,
    scale: float | None = None,
    cap: float | None = None,
    window: tuple[int, int] | None = None,
    share: float | None = None,
    top: int | None = None,
    block: int | None = None,
) -> Float[Array, "b n h e"]:
    """Weighs the values `v` by `attention_weights`, which has the other arguments.

    Args:
      block: queries whose logits stand in memory together; None takes all of them as long as a head has no
        more than `LOGITS_AT_ONCE` logits, else `BLOCK`. A `share`, which is of a whole head, takes all.
    """
    n, s = q.shape[1], k.shape[1]
    options: dict[str, Any] = dict(causal=causal, scale=scale, cap=cap, window=window, top=top)
    if block is None:
        block = n if n * s <= LOGITS_AT_ONCE else BLOCK
    if share is None and block < n:
        # Cut by the compiler, every turn would fetch its queries from the device that has them.
        names = ("batch", "length", "heads", None), ("batch", None, "kv_heads", None)
        rows = (_names(array, ("batch", "heads", "length", None)) for array in (mask, bias))
        run = on_each_device(
            functools.partial(_by_blocks, block=block, options=options),
            (names[0], names[1], names[1], ("length",), *rows),
            names[0],
        )
        return run(q, k, v, jnp.arange(n), mask, bias)
    weights = attention_weights(q, k, mask=mask, bias=bias, share=share, **options)
    return weighted_sum(weights.astype(v.dtype), v)  # [B, N, H, E]


def _names(array: Array | None, names: Names) -> Names:
    """Of the axes of a mask or a bias, those that are not shared by all."""
    sides = (None,) * len(names) if array is None else array.shape
    return tuple(None if side == 1 else name for side, name in zip(sides, names, strict=True))


def _by_blocks(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g e"],
    place: Int[Array, " n"],
    mask: Bool[Array, "#b #h #n s"] | None,
    bias: Float[Array, "#b #h #n s"] | None,
    *,
    block: int,
    options: dict[str, Any],
) -> Float[Array, "b n h e"]:
    """`softmax_attention`, so many queries at a time; the backward pass computes their logits again.

    `place` is that of each query in its row.
    """
    block = min(block, q.shape[1])
    whole, rest = divmod(q.shape[1], block)

    def some(first: Int[Array, ""] | int, count: int) -> Float[Array, "b m h e"]:
        def rows(array: Array | None, axis: int) -> Any:
            if array is None or array.shape[axis] == 1:
                return array
            return jax.lax.dynamic_slice_in_dim(array, first, count, axis)

        weights = attention_weights(
            rows(q, 1), k, mask=rows(mask, 2), bias=rows(bias, 2), first=place[0] + first, **options
        )  # [B, H, M, S]
        return weighted_sum(weights.astype(v.dtype), v)  # [B, M, H, E]

    # Inside a loop nothing is merged that should be computed again.
    again = jax.checkpoint(lambda first: some(first, block), prevent_cse=False)
    y = jax.lax.map(again, block * jnp.arange(whole))  # [N / M, B, M, H, E]
    y = jnp.moveaxis(y, 0, 1).reshape(q.shape[0], whole * block, *y.shape[3:])  # [B, N, H, E]
    return jnp.concatenate([y, some(whole * block, rest)], axis=1) if rest else y


def attention_weights(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b s g d"],
    *,
    mask: Bool[Array, "#b #h #n s"] | None,
    causal: bool,
    bias: Float[Array, "#b #h #n s"] | None = None,
    scale: float | None = None,
    cap: float | None = None,
    window: tuple[int, int] | None = None,
    share: float | None = None,
    top: int | None = None,
    first: Int[Array, ""] | int = 0,
) -> Float[Array, "b h n s"]:
    """How much of each value a query takes, in float32.

    Args:
      q: queries; `h / g` of them share a key/value head.
      k: keys.
      mask: which keys a query may see.
      causal: whether none that come later, by their place in the row.
      bias: added to the logits.
      scale: factor of the logits; None means `1 / sqrt(d)`.
      cap: logits become `cap tanh(logits / cap)` before anything is masked.
      window: how many tokens to the left and to the right a query may see.
      share: of the weights of each head those that count, see `largest`; None counts all.
      top: keys of each query that count, those with the largest logits; their weights sum to 1. With them
        those that are equal to the last.
      first: place of the first query in its row, for `causal` and `window`.
    """
    n, s = q.shape[1], k.shape[1]
    logits = dot_products(q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)  # [B, H, N, S]
    if cap is not None:
        logits = cap * jnp.tanh(logits / cap)
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    distance = first + jnp.arange(n)[:, None] - jnp.arange(s)[None, :]  # query - key
    allowed = mask
    if causal:
        allowed = both(allowed, (distance >= 0)[None, None])
    if window is not None:
        allowed = both(allowed, ((distance <= window[0]) & (-distance <= window[1]))[None, None])
    if allowed is not None:
        logits = jnp.where(allowed, logits, _NEVER)
    if top is not None and top < s:
        least = jax.lax.top_k(logits, top)[0][..., -1:]  # [B, H, N, 1]
        logits = jnp.where(logits >= least, logits, _NEVER)
    weights = softmax(logits)  # [B, H, N, S]
    return weights if share is None else largest(weights, share)


def largest(weights: Float[Array, "b h n s"], share: float) -> Float[Array, "b h n s"]:
    """A share of all weights of each head, the largest; the others become 0, and no row sums to 1 any more.

    The smallest that counts is found bit by bit: among numbers that are not negative the order of floats is
    that of their bits, and 31 counts are much faster than sorting the weights of a head.
    """
    entries = weights.shape[2] * weights.shape[3]
    kept = min(entries - int(entries * (1 - share)) + 1, entries)
    bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(weights).astype(jnp.float32), jnp.int32)

    def finer(step: Int[Array, ""], smallest: Int[Array, "b h 1 1"]) -> Int[Array, "b h 1 1"]:
        tried = smallest | (1 << (30 - step))
        enough = jnp.sum(bits >= tried, axis=(2, 3), keepdims=True) >= kept
        return jnp.where(enough, tried, smallest)

    smallest = jax.lax.fori_loop(0, 31, finer, jnp.zeros((*weights.shape[:2], 1, 1), jnp.int32))
    return jnp.where(bits >= smallest, weights, 0)


def both(a: Bool[Array, "..."] | None, b: Bool[Array, "..."]) -> Bool[Array, "..."]:
    """Where both allow; None allows everything."""
    return b if a is None else a & b


# Heads stand before places in both products: a matrix times a matrix for each head. XLA's CPU backend takes
# the strides of `[B, N, H, D]` for a slower product, up to three times in windows of 49 places.


def dot_products(q: Float[Array, "b n h d"], k: Float[Array, "b s g d"]) -> Float[Array, "b h n s"]:
    """q_n k_s for every head, in float32; `h / g` query heads share a key head."""
    b, n, h, d = q.shape
    s, g = k.shape[1:3]
    rows = q.reshape(b, n, g, h // g, d).transpose(0, 2, 3, 1, 4).reshape(b, g, h // g * n, d)
    contracted = ((3,), (3,)), ((0, 1), (0, 1))
    # Without it the products of the backward pass mix types: github.com/jax-ml/jax/issues/24047.
    precision = {
        "bfloat16": jax.lax.DotAlgorithmPreset.BF16_BF16_F32,
        "float16": jax.lax.DotAlgorithmPreset.F16_F16_F32,
    }.get(q.dtype.name)
    logits = jax.lax.dot_general(
        rows, k.swapaxes(1, 2), contracted, precision=precision, preferred_element_type=jnp.float32
    )  # [B, G, H/G N, S]
    return logits.reshape(b, h, n, s)


def weighted_sum(weights: Float[Array, "b h n s"], v: Float[Array, "b s g e"]) -> Float[Array, "b n h e"]:
    """sum_s p_ns v_s for every head; `h / g` heads of weights share a value head."""
    b, h, n, s = weights.shape
    g, d = v.shape[2:]
    y = jax.lax.dot_general(
        weights.reshape(b, g, h // g * n, s), v.swapaxes(1, 2), (((3,), (2,)), ((0, 1), (0, 1)))
    )  # [B, G, H/G N, D]
    return y.reshape(b, h, n, d).swapaxes(1, 2)


@jax.custom_jvp
def softmax(logits: Float[Array, "*batch s"]) -> Float[Array, "*batch s"]:
    """e^l / sum e^l over the last axis.

    The backward pass keeps the result alone; `jax.nn.softmax` also keeps the exponentials.
    """
    powers = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    return powers / jnp.sum(powers, axis=-1, keepdims=True)


@softmax.defjvp
def _softmax_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    y, dot = softmax(*primals), tangents[0]
    return y, y * (dot - jnp.sum(y * dot, axis=-1, keepdims=True))
