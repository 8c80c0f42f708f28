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
    v: Float[Array, "b s g d"],
    *,
    mask: Bool[Array, "#b 1 #n s"] | None,
    causal: bool,
    bias: Float[Array, "#b 1 #n s"] | None = None,
    scale: float | None = None,
    cap: float | None = None,
    window: tuple[int, int] | None = None,
) -> Float[Array, "b n h d"]:
    """Weighs the values; JAX's own attention wherever it can express the request.

    Args:
      q: queries; `h / g` of them share a key/value head.
      k: keys.
      v: values.
      mask: which keys a query may see.
      causal: whether none that come later, by their place in the row.
      bias: added to the logits.
      scale: factor of the logits; None means `1 / sqrt(d)`.
      cap: logits become `cap tanh(logits / cap)` before anything is masked.
      window: how many tokens to the left and to the right a query may see.
    """
    if cap is None:
        return jax.nn.dot_product_attention(
            q, k, v, bias=bias, mask=mask, is_causal=causal, scale=scale, local_window_size=window
        )
    b, n, h, d = q.shape
    s, g = k.shape[1:3]
    grouped = (q * (d**-0.5 if scale is None else scale)).reshape(b, n, g, h // g, d)
    logits = jnp.einsum("bngrd,bsgd->bgrns", grouped, k, preferred_element_type=jnp.float32)
    logits = cap * jnp.tanh(logits / cap)
    if bias is not None:
        logits = logits + bias[:, :, None].astype(jnp.float32)
    allowed = jnp.ones((1, 1, n, s), bool) if mask is None else mask
    distance = jnp.arange(n)[:, None] - jnp.arange(s)[None, :]  # query - key
    if causal:
        allowed = allowed & (distance >= 0)[None, None]
    if window is not None:
        allowed = allowed & ((distance <= window[0]) & (-distance <= window[1]))[None, None]
    weights = jax.nn.softmax(
        jnp.where(allowed[:, :, None], logits, -0.7 * jnp.finfo(jnp.float32).max), axis=-1
    )
    return jnp.einsum("bgrns,bsgd->bngrd", weights.astype(v.dtype), v).reshape(b, n, h, d)
