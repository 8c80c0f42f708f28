"""Attention of the tokens that are decoded to a cache, split over the cache, on TPU and Hopper.

    y = sum_s e^(x_s) v_s / sum_s e^(x_s),    x_s = scale q . k_s,    s < length of the row

Each key and value is read once, by all query heads that share it together: a step takes the time of reading
the cache. Parts of the keys are summed apart and joined at the end (Dao et al., "Flash-Decoding for
long-context inference", 2023), or where programs run one after the other, as on a TPU, added up.

With `within` no part waits for a maximum: e^(x - phi) with the same phi for all, as long as scores lie in
low < x - phi < high. Where one does not, what it spoils is computed again with the true maximum: on a GPU
the part of the row and the heads that share keys, on a TPU the row from that block on (what was summed until
there is right). The result is that of the softmax either way. Hong et al., "FlashDecoding++", MLSys 2024,
arXiv:2311.01282, section 3.

Pages: rows may hold their slots in pages of one array, in any order (Kwon et al., PagedAttention, 2023).

Only forward: nobody differentiates decoding, and a backward kernel would be attention's. Where it is
differentiated after all, the specification is.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.decode_attention import cost, gpu, reference, tpu
from pallas_kernels.decode_attention.within import LEAST, MOST, Within
from pallas_kernels.op import Implementation, Interpret, Op, Unsupported

__all__ = ["OP", "Within", "decode_attention"]

DTYPES = ("float32", "bfloat16", "float16")

OP = Op(
    name="decode_attention",
    reference=reference.decode_attention,
    gpu=gpu.forward,
    tpu=tpu.forward,
    cost=cost.forward,
)


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array | None = None,
    pages: jax.Array | None = None,
    valid: jax.Array | None = None,
    *,
    scale: float | None = None,
    cap: float | None = None,
    within: Within | None = None,
    implementation: Implementation | None = None,
    interpret: Interpret = False,
    strict: bool = False,
) -> jax.Array:
    """softmax(scale q k^T) v, of the slots in use.

    Args:
      q: `[B, N, H, D]` queries of the last N tokens of every row; each sees itself and what comes before.
      k: `[B, S, G, D]` keys, or `[pages, page, G, D]` with a page table; `H / G` query heads share one. What
        slots hold that are not seen does not matter as long as it is finite.
      v: `[B, S, G, E]` values, or `[pages, page, G, E]`.
      lengths: `[B]` int32, slots of a row in use, with the tokens of q; None means all. A row of none gets
        zeros.
      pages: `[B, P]` int32, the pages of a row, in order; of those that hold no slot in use the number does
        not matter.
      valid: `[B, S]` bool, of the slots in use those that hold something; None means all.
      scale: factor of the products; None means `1 / sqrt(D)`.
      cap: scores become `cap tanh(scores / cap)`; None leaves them free.
      within: the range of scores where kernels need no maximum; None keeps the running maximum.
      implementation: `reference`, `gpu`, `tpu`; None chooses by the platform that is lowered for.
      interpret: runs the named kernel on any platform.
      strict: whether a kernel that does not lower is an error; else the reference is used, with a warning.

    Returns:
      `[B, N, H, E]`.

    Raises:
      Unsupported: for shapes that do not fit together or types that no implementation takes, and for what the
        named implementation does not take.
    """
    _check(q, k, v, pages)
    batch = q.shape[0]
    slots = k.shape[1] if pages is None else k.shape[1] * pages.shape[1]
    if lengths is None:
        lengths = jnp.full((batch,), slots, jnp.int32)
    if lengths.shape != (batch,) or lengths.dtype != np.int32:
        raise Unsupported(
            f"decode_attention: lengths {lengths.dtype}{list(lengths.shape)} must be int32[{batch}]."
        )
    if valid is not None and (valid.shape != (batch, slots) or valid.dtype != np.bool_):
        raise Unsupported(
            f"decode_attention: valid {valid.dtype}{list(valid.shape)} must be bool{[batch, slots]}."
        )
    if within is not None and not LEAST <= within.low < within.high <= MOST:
        raise Unsupported(
            f"decode_attention: {within} must lie between {LEAST:g} and {MOST:g}, where exponentials are"
            " sure; a wider range keeps the running maximum: within=None."
        )
    return OP(
        *(q, k, v, lengths, pages, valid),
        implementation=implementation,
        interpret=interpret,
        strict=strict,
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        cap=None if cap is None else float(cap),
        within=within,
    )


def _check(q: jax.Array, k: jax.Array, v: jax.Array, pages: jax.Array | None) -> None:
    rows = "[B, S, {}]" if pages is None else "[pages, page, {}]"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise Unsupported(
            f"decode_attention takes q [B, N, H, D], k {rows.format('G, D')} and v {rows.format('G, E')}, not"
            f" {q.shape}, {k.shape} and {v.shape}."
        )
    if pages is not None and (pages.ndim != 2 or pages.shape[0] != q.shape[0] or pages.dtype != np.int32):
        raise Unsupported(
            f"decode_attention: pages {pages.dtype}{list(pages.shape)} must be int32[{q.shape[0]}, P]."
        )
    if k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3] or (pages is None and q.shape[0] != k.shape[0]):
        raise Unsupported(
            f"decode_attention: queries {q.shape}, keys {k.shape} and values {v.shape} do not fit: q and k"
            " share the channels of a head, k and v slots and heads, and all the batch, without pages."
        )
    if q.shape[2] % k.shape[2]:
        raise Unsupported(f"decode_attention: {k.shape[2]} key heads do not divide {q.shape[2]} query heads.")
    if 0 in (*q.shape, *k.shape, *v.shape, *(() if pages is None else pages.shape)):
        raise Unsupported(f"decode_attention needs at least one query and one slot: {q.shape}, {k.shape}.")
    if not q.dtype == k.dtype == v.dtype or q.dtype.name not in DTYPES:
        raise Unsupported(
            f"decode_attention takes q, k and v of one type, {', '.join(DTYPES)}, not {q.dtype}, {k.dtype}"
            f" and {v.dtype}."
        )
