"""Attention over chosen blocks of keys, each at a resolution of its own, on TPU.

    k^1 = k,  k^{l+1} = the means of neighbouring pairs of k^l, v likewise
    y_i = softmax over the blocks j with l = levels[i, j] > 0 of (q_i k_j^l + (l - 1) log 2) v_j^l

A query block reads a block of keys whole (level 1), as means of 2, 4, 8 and more keys, or not at all (0). A
mean stands for as many keys as it is of, so that where keys are alike nothing is lost. With a depth of 1 it
is attention under a mask of blocks, and where all levels are 1 it is dense attention.

PSA: Li et al. 2025, "Pyramid Sparse Attention for Efficient Video Understanding and Generation",
arXiv:2512.04025. Masks of blocks: DHSA, Xiong et al. 2025, arXiv:2510.24606.

Only forward: levels are chosen for models that are trained. Derivatives are those of the specification.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_sparse_attention import cost, reference, tpu
from pallas_kernels.op import Implementation, Interpret, Op, Unsupported

__all__ = ["OP", "block_sparse_attention"]

DTYPES = ("float32", "bfloat16", "float16")

OP = Op(name="block_sparse_attention", reference=reference.attention, tpu=tpu.forward, cost=cost.forward)


def block_sparse_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    levels: jax.Array,
    *,
    depth: int = 4,
    queries: int = 128,
    keys: int = 128,
    scale: float | None = None,
    causal: bool = False,
    shares: tuple[float, ...] | None = None,
    implementation: Implementation | None = None,
    interpret: Interpret = False,
    strict: bool = False,
) -> jax.Array:
    """Softmax attention over the blocks of keys that each block of queries reads.

    Args:
      q: `[B, N, H, D]` queries.
      k: `[B, S, G, D]` keys; `H / G` query heads share one.
      v: `[B, S, G, E]` values.
      levels: `[B, L, I, J]` int32 of N / `queries` and S / `keys` blocks, rounded up: 0 for a block that is
        not read, l for one that is read as means of 2^(l-1) keys. Levels beyond the depth are the depth. What
        the last block lacks of a whole one counts nowhere. L is H, or G, or between: `H / L` query heads that
        share keys read the same blocks.
      depth: how many levels there are.
      queries: of a block.
      keys: of a block, a multiple of 2^(depth-1).
      scale: factor of the products, `D^-1/2` if None.
      causal: whether a query sees no later key; the last query stands with the last key. A block that some
        queries of a block see in part is read whole where it is read, as its means would tell of later keys.
      shares: about what part of the blocks is read at each level from the first one on; None for all at the
        first. The compiler is told so, and no result depends on it.
      implementation: `reference`, `gpu`, `tpu`; None chooses by the platform that is lowered for.
      interpret: runs the named kernel on any platform.
      strict: whether a kernel that does not lower is an error; else the reference is used, with a warning.

    Returns:
      `[B, N, H, E]`, zeros where a query sees nothing.

    Raises:
      Unsupported: for shapes that do not fit together or types that no implementation takes, and for what the
        named implementation does not take.
    """
    _check(q, k, v, levels, depth, queries, keys, shares)
    levels = jnp.minimum(levels, depth)
    if causal:
        levels = _causal(levels, q.shape[1], k.shape[1], queries, keys)
    return OP(
        *(q, k, v, levels),
        implementation=implementation,
        interpret=interpret,
        strict=strict,
        depth=depth,
        queries=queries,
        keys=keys,
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        causal=causal,
        shares=shares,
    )


def _causal(levels: jax.Array, n: int, s: int, queries: int, keys: int) -> jax.Array:
    """Levels without blocks that come too late, and level 1 for those that are seen in part."""
    first = np.arange(levels.shape[2])[:, None] * queries + s - n  # the key that a block's first query is at
    last = np.minimum(first + queries, s) - 1
    block = np.arange(levels.shape[3])[None] * keys
    whole, some = first >= np.minimum(block + keys, s) - 1, last >= block
    return jnp.where(jnp.asarray(whole), levels, jnp.where(jnp.asarray(some), jnp.minimum(levels, 1), 0))


def _check(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    levels: jax.Array,
    depth: int,
    queries: int,
    keys: int,
    shares: tuple[float, ...] | None,
) -> None:
    name = "block_sparse_attention"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise Unsupported(
            f"{name} takes q [B, N, H, D], k [B, S, G, D] and v [B, S, G, E], not {q.shape}, {k.shape} and"
            f" {v.shape}."
        )
    if k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3] or q.shape[0] != k.shape[0]:
        raise Unsupported(
            f"{name}: queries {q.shape}, keys {k.shape} and values {v.shape} do not fit: q and k share the"
            " channels of a head, k and v places and heads, and all the batch."
        )
    if 0 in (*q.shape, *k.shape, *v.shape):
        raise Unsupported(f"{name} needs at least one query and one key: {q.shape}, {k.shape}.")
    if q.shape[2] % k.shape[2]:
        raise Unsupported(f"{name}: {k.shape[2]} key heads do not divide {q.shape[2]} query heads.")
    if not q.dtype == k.dtype == v.dtype or q.dtype.name not in DTYPES:
        raise Unsupported(
            f"{name} takes q, k and v of one type, {', '.join(DTYPES)}, not {q.dtype}, {k.dtype} and"
            f" {v.dtype}."
        )
    if depth < 1 or queries < 1 or keys < 1 or keys % 2 ** (depth - 1):
        raise Unsupported(
            f"{name}: depth={depth}, queries={queries} and keys={keys}: blocks of keys must be a multiple of"
            " 2^(depth-1), and all at least 1."
        )
    wanted = [q.shape[0], q.shape[2], -(-q.shape[1] // queries), -(-k.shape[1] // keys)]
    given = list(levels.shape)
    if levels.ndim != 4 or [given[0], *given[2:]] != [wanted[0], *wanted[2:]] or levels.dtype != np.int32:
        raise Unsupported(f"{name}: levels {levels.dtype}{given} must be int32{wanted}.")
    if given[1] == 0 or wanted[1] % given[1] or given[1] % k.shape[2]:
        raise Unsupported(
            f"{name}: levels of {given[1]} heads: give those of all {wanted[1]}, of the {k.shape[2]} of keys,"
            " or of a number between that divides the one and is divided by the other."
        )
    if shares is not None and (len(shares) > depth or min(shares, default=0) < 0 or sum(shares) > 1):
        raise Unsupported(f"{name}: shares={shares}: give a part of 1 for each of up to {depth} levels.")
