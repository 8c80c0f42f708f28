"""Pyramid sparse attention: every block of queries sees the keys that matter to it whole, others as averages.

    s_ij = max over sampled queries q of block i and keys k of block j of exp(q k - max over all k' of q k')
    level_ij = l where the rank of s_ij in row i lies within the l-th share of the blocks, 0 behind the last
    y_i = softmax over the blocks j with l = level_ij > 0 of (q_i k_j^l + (l - 1) log 2) v_j^l

k^l are means of 2^(l-1) keys. Every fourth query and key is sampled, so that choosing costs a sixteenth of
the logits of dense attention. Shares are of blocks, by rank (`shares_of="blocks"`), or of the sum of s in a
row, from the largest on (`"mass"`): a row whose attention is spread then reads more.

With a causal mask, shares are of the blocks that are seen, and those that hold later keys too are read as
they are. Decoding reads all keys. Projections, rotary positions and the cache are those of
`effjax.mixers.attention`; the sum is done by `pallas_kernels.block_sparse_attention`, which has a kernel for
TPUs.

Li et al. 2025, "PSA: Pyramid Sparse Attention for Efficient Video Understanding and Generation",
arXiv:2512.04025, and its published code, whose defaults are those here.
"""

import itertools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from effjax.decoding.cache import Cache
from effjax.errors import UsageError
from effjax.mixers.attention import Attention
from effjax.mixers.context import Context
from effjax.mixers.dot_product import attention_weights
from effjax.mixers.stats import Watch
from effjax.parallel.each_device import on_each_device

# Of so many queries and keys one is sampled.
SAMPLED = 4
# The score of a block whose keys are all later than the queries.
_NEVER = -1.0


class PyramidAttention(Attention):
    """Attention of blocks of queries to blocks of keys, each at a resolution of its own.

    Attributes:
      shares: of the blocks of keys, or of the mass, at each level from the first on; the rest is not read.
      shares_of: what shares are of.
      queries: of a block.
      keys: of a block, a multiple of 2^(levels - 1).
      together: whether query heads that share keys choose together, by the mean of s, which is faster.
      implementation: of the sum; None chooses by the platform that is lowered for.
    """

    shares: tuple[float, ...] = (0.1, 0.05, 0.0, 0.2)
    shares_of: Literal["blocks", "mass"] = "blocks"
    queries: int = 128
    keys: int = 64
    together: bool = False
    implementation: Literal["reference", "tpu"] | None = None

    @nn.compact
    def attend(
        self,
        x: Float[Array, "b n c"],
        context: Context,
        cache: Cache | None,
        watch: Watch | None = None,
    ) -> tuple[Float[Array, "b n c"], Any]:
        """Attends among the tokens of `x` (no cache), or from them to the cache they are added to.

        Raises:
          UsageError: for what blocks of keys do not know, and for shares that are none.
        """
        self._check(context, cache, watch)
        positions = self.positions(x, context, cache)
        q, k, v = self.project(x, positions, context)
        if cache is None:
            # Query heads are cut as the key heads they share: a device has both.
            heads = ("batch", None, "kv_heads", None)
            y = on_each_device(self._chosen, (heads, heads, heads), heads)(q, k, v)  # [B, N, H, E]
        else:
            options: dict[str, Any] = dict(scale=self.scale, causal=False, share=None, top=None)
            y, cache = self.remember(
                *(q, k, v, positions, cache, context),
                lambda queries, keys, allowed, bias: attention_weights(
                    queries, keys, mask=allowed, bias=bias, **options
                ),
                self.causal,
            )
        return self.output(y, x.shape[-1], context), cache

    @nn.nowrap
    def _chosen(
        self, q: Float[Array, "b n h d"], k: Float[Array, "b n g d"], v: Float[Array, "b n g e"]
    ) -> Float[Array, "b n h e"]:
        """What whole sequences take."""
        # Pallas is slow to import, and most programs have no use for it.
        from pallas_kernels.block_sparse_attention import block_sparse_attention

        size: dict[str, Any] = dict(queries=self.queries, keys=self.keys, causal=self.causal)
        scores = importance(*map(jax.lax.stop_gradient, (q, k)), scale=self.scale, **size)  # [B, H, I, J]
        if self.together:
            batch, heads, rows, columns = scores.shape
            shared = scores.reshape(batch, k.shape[2], heads // k.shape[2], rows, columns)
            scores = jnp.mean(shared, axis=2)  # [B, G, I, J]
        chosen = levels(scores, self.shares, self.shares_of)
        if self.causal:
            first = np.arange(chosen.shape[2])[:, None] * self.queries
            start = np.arange(chosen.shape[3])[None] * self.keys
            crossed = (start + self.keys - 1 > first) & (start <= first + self.queries - 1)
            chosen = jnp.where(jnp.asarray(crossed)[None, None], 1, chosen)
        return block_sparse_attention(
            *(q, k, v, chosen),
            **size,
            depth=len(self.shares),
            scale=self.scale,
            shares=self.shares if self.shares_of == "blocks" else None,
            implementation=self.implementation,
        )

    @nn.nowrap
    def _check(self, context: Context, cache: Cache | None, watch: Watch | None) -> None:
        fields = ("window", "logit_cap", "top", "unified")
        known = {name: getattr(self, name) for name in fields}
        of_context = ("window", "share", "size") + (("segments", "valid") if cache is None else ())
        known |= {f"context.{name}": getattr(context, name) for name in of_context}
        for name, value in known.items():
            if value is not None:
                raise UsageError(f"pyramid attention has no {name}: it reads whole blocks of one sequence.")
        if watch is not None:
            raise UsageError("pyramid attention does not tell its weights.")
        if not self.shares or min(self.shares) < 0 or not 0 < sum(self.shares) <= 1 + 1e-6:
            raise UsageError(f"shares={self.shares}: give a part for each level, in all above 0 and up to 1.")
        if min(self.queries, self.keys) < 1 or self.keys % 2 ** (len(self.shares) - 1):
            raise UsageError(
                f"queries={self.queries} and keys={self.keys} of a block: at least 1, and keys a multiple"
                f" of {2 ** (len(self.shares) - 1)}, of which the last level has means."
            )


def importance(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b s g d"],
    *,
    queries: int,
    keys: int,
    causal: bool,
    scale: float | None = None,
) -> Float[Array, "b h i j"]:
    """s above, of blocks of queries and of keys; negative where all keys are later than all queries.

    Args:
      q: queries.
      k: keys; `H / G` heads share them.
      queries: of a block.
      keys: of a block.
      causal: whether a query sees no later key; the last query stands with the last key.
      scale: of the products, `D^-1/2` if None.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    few_q, at_q = _sampled(q, queries)  # [B, I, M, H, D], [I, M]
    few_k, at_k = _sampled(k, keys)  # [B, J, L, G, D], [J, L]
    batch, rows, count, heads, size = few_q.shape
    groups = few_k.shape[3]
    few_q = few_q.reshape(batch, rows, count, groups, heads // groups, size)
    seen = np.ones((rows, count, *at_k.shape), bool)
    if causal:
        seen = seen & (at_k[None, None] <= at_q[:, :, None, None] + k.shape[1] - q.shape[1])

    def of_group(group: tuple[Array, Array]) -> Array:
        logits = jnp.einsum("bimrd,bjld->brimjl", *group, preferred_element_type=jnp.float32) * scale
        logits = jnp.where(jnp.asarray(seen)[None, None], logits, -jnp.inf)
        best = jnp.max(logits, axis=5)  # [B, R, I, M, J]
        top = jnp.max(best, axis=4, keepdims=True)
        share = jnp.where(best > -jnp.inf, jnp.exp(best - jnp.where(top > -jnp.inf, top, 0.0)), _NEVER)
        return jnp.max(share, axis=3)  # [B, R, I, J]

    # A group after the other: the scores of all are many.
    found = jax.lax.map(of_group, (jnp.moveaxis(few_q, 3, 0), jnp.moveaxis(few_k, 3, 0)))  # [G, B, R, I, J]
    return jnp.moveaxis(found, 0, 1).reshape(batch, heads, rows, -1)


def _sampled(x: Float[Array, "b n h d"], block: int) -> tuple[Float[Array, "b i m h d"], np.ndarray]:
    """Some of each block, and their places; where the last block has none, its first token."""
    first = np.arange(-(-x.shape[1] // block))[:, None] * block
    # From the end of a block on, where causal queries see most.
    place = first + np.arange(block - 1, -1, -min(SAMPLED, block))[None]
    place = np.where(place < x.shape[1], place, first)
    return x[:, place], place


def levels(
    scores: Float[Array, "b h i j"], shares: tuple[float, ...], shares_of: Literal["blocks", "mass"]
) -> Int[Array, "b h i j"]:
    """The level of each block by its scores; of equal ones the first has the lower.

    Args:
      scores: negative for blocks that are not seen; these have level 0.
      shares: of the blocks that are seen, rounded up, or of the sum of their scores, of each level.
      shares_of: which. Of the mass a level ends with the block that reaches its share.
    """
    seen = scores >= 0
    order = jnp.argsort(-scores, axis=-1, stable=True)  # [B, H, I, J]
    rank = jnp.argsort(order, axis=-1)
    if shares_of == "blocks":
        before, whole = rank.astype(jnp.float32), jnp.sum(seen, axis=-1, keepdims=True)
    else:
        mass = jnp.take_along_axis(jnp.where(seen, scores, 0.0), order, axis=-1)
        before = jnp.take_along_axis(jnp.cumsum(mass, axis=-1) - mass, rank, axis=-1)
        whole = jnp.sum(mass, axis=-1, keepdims=True)
    found = jnp.zeros(scores.shape, jnp.int32)
    for level, bound in reversed(list(enumerate(itertools.accumulate(shares), start=1))):
        # A thousandth of a block is rounding, not a block.
        found = jnp.where(before < bound * whole - 1e-3 * (shares_of == "blocks"), level, found)
    return jnp.where(seen, found, 0)
