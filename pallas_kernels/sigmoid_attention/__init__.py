"""Sigmoid attention, forward and backward, on TPU and Hopper.

    y = sigmoid(q k^T / sqrt(d) + b) v,    b = -log n                    Ramapuram et al. 2024, section 3

n is the number of keys. With that bias a row of weights sums to about what it does in softmax attention at
the start of training; without it (b = 0) to n/2, and training fails. No row is normalised, so

- a tile of keys needs no other: its contribution is added, and there is no statistic to keep for backward;
- a key without a value does not exist: keys are masked by zeros in v, and lengths filled up with zeros are
  exact. Kernels know no masks but those of order and of segments.

In a causal model b is of the length it is trained at, one number for all rows, and stays that in decoding:
give `bias`, as the default would follow the length of each call.

"Theory, Analysis, and Best Practices for Sigmoid Self-Attention", arXiv:2409.04431, whose code is
apple/ml-sigmoid-attention.
"""

import math

import jax
import jax.numpy as jnp

from pallas_kernels.op import Implementation, Interpret, Op, Unsupported
from pallas_kernels.sigmoid_attention import cost, gpu, reference, tpu

DTYPES = ("float32", "bfloat16", "float16")

OP = Op(
    name="sigmoid_attention",
    reference=reference.sigmoid_attention,
    gpu=gpu.forward,
    tpu=tpu.forward,
    gpu_backward=gpu.backward,
    tpu_backward=tpu.backward,
    cost=cost.forward,
)


def sigmoid_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None = None,
    *,
    valid: jax.Array | None = None,
    scale: float | None = None,
    bias: float | None = None,
    causal: bool = False,
    implementation: Implementation | None = None,
    interpret: Interpret = False,
    strict: bool = False,
) -> jax.Array:
    """sigmoid(scale q k^T + bias) v, of the keys that a query may see.

    Args:
      q: `[B, N, H, D]` queries.
      k: `[B, S, G, D]` keys; `H / G` query heads share one.
      v: `[B, S, G, E]` values.
      segments: `[B, N]` int, where N = S: a query sees keys of its own segment; None means all.
      valid: `[B, S]` bool, the keys that exist; a query that sees none gets zeros.
      scale: factor of the products; None means `1 / sqrt(D)`.
      bias: added to the logits; None means `-log S`.
      causal: whether a query sees no later key; the last query stands with the last key.
      implementation: `reference`, `gpu`, `tpu`; None chooses by the platform that is lowered for.
      interpret: runs the named kernel on any platform.
      strict: whether a kernel that does not lower is an error; else the reference is used, with a warning.

    Returns:
      `[B, N, H, E]`.

    Raises:
      Unsupported: for shapes that do not fit together or types that no implementation takes, and for what the
        named implementation does not take.
    """
    _check(q, k, v, segments, valid)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    bias = -math.log(k.shape[1]) if bias is None else float(bias)
    if valid is not None:
        # Keys too: what they hold may not be a number.
        k, v = (jnp.where(valid[:, :, None, None], array, 0) for array in (k, v))
    return OP(
        *(q, k, v, segments),
        implementation=implementation,
        interpret=interpret,
        strict=strict,
        scale=scale,
        bias=bias,
        causal=causal,
    )


def _check(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, valid: jax.Array | None
) -> None:
    if not q.ndim == k.ndim == v.ndim == 4:
        raise Unsupported(
            f"sigmoid_attention takes q [B, N, H, D], k [B, S, G, D] and v [B, S, G, E], not {q.shape},"
            f" {k.shape} and {v.shape}."
        )
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise Unsupported(
            f"sigmoid_attention: queries {q.shape}, keys {k.shape} and values {v.shape} do not fit: all share"
            " the batch, q and k the channels of a head, k and v places and heads."
        )
    if q.shape[2] % k.shape[2]:
        raise Unsupported(
            f"sigmoid_attention: {k.shape[2]} key heads do not divide {q.shape[2]} query heads."
        )
    if 0 in (*q.shape, *k.shape, *v.shape):
        raise Unsupported(f"sigmoid_attention needs at least one query and one key: {q.shape}, {k.shape}.")
    if not q.dtype == k.dtype == v.dtype or q.dtype.name not in DTYPES:
        raise Unsupported(
            f"sigmoid_attention takes q, k and v of one type, {', '.join(DTYPES)}, not {q.dtype}, {k.dtype}"
            f" and {v.dtype}."
        )
    if valid is not None and (valid.shape != k.shape[:2] or valid.dtype != jnp.bool_):
        raise Unsupported(
            f"sigmoid_attention: valid {valid.dtype}{list(valid.shape)} must be bool{list(k.shape[:2])}."
        )
    if segments is None:
        return
    if not segments.shape == q.shape[:2] == k.shape[:2] or segments.dtype != jnp.int32:
        raise Unsupported(
            f"sigmoid_attention: segments {segments.dtype}{list(segments.shape)} must be int32, one for each"
            f" query and the key beside it, of which there are {q.shape[1]} and {k.shape[1]}."
        )
