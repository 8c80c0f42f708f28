"""Softmax over dot products of queries and keys.

    y_n = sum_s p_ns v_s,    p_n = softmax(cap(scale q_n k_s + bias_ns) where s is allowed)

`cap(l) = c tanh(l / c)` bounds the logits where a model asks for it: Gemma 2, 2024.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


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
) -> Float[Array, "b n h e"]:
    """Weighs the values `v` by `attention_weights`, which has the other arguments."""
    weights = attention_weights(
        q, k, mask=mask, causal=causal, bias=bias, scale=scale, cap=cap, window=window, share=share
    )
    return weighted_sum(weights.astype(v.dtype), v)  # [B, N, H, D]


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
    """
    n, s = q.shape[1], k.shape[1]
    logits = dot_products(q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)  # [B, H, N, S]
    if cap is not None:
        logits = cap * jnp.tanh(logits / cap)
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    distance = jnp.arange(n)[:, None] - jnp.arange(s)[None, :]  # query - key
    allowed = mask
    if causal:
        allowed = both(allowed, (distance >= 0)[None, None])
    if window is not None:
        allowed = both(allowed, ((distance <= window[0]) & (-distance <= window[1]))[None, None])
    if allowed is not None:
        logits = jnp.where(allowed, logits, -0.7 * jnp.finfo(jnp.float32).max)
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
