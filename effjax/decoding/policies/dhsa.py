"""Dynamic hierarchical sparse attention: chunks are compared, the tokens of the best ones are read.

    k_c = sum_{j in c} k_j / sqrt|c|,   q = sum_{i in block} q_i / sqrt|block|,   mean over a group's heads
    read: the last `local` tokens, and of the others the first budget - local in order of q k_c

The keys' chunks have unequal lengths: `effjax.mixers.boundaries` says where they begin. Of a prompt every
`block` queries choose their keys together and read these alone, so that a prompt of n tokens costs n budget
products instead of n^2; a single query is a block of its own. As the chunk of a key may reach beyond a query,
what is chosen may depend on later tokens of the same prompt; what is read does not. Blocks are counted with
the padding before a prompt.

Xiong, Zou, Fekri and Cho, "Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device
LLMs", arXiv:2510.24606, section 3, with budget 2048, block 128, local 128 and chunks of 16 as in the authors'
first code. There all heads of a layer share one choice, the first layer's boundaries serve all layers, and
tokens that are written read everything; here each key/value head chooses, each layer finds its boundaries,
and tokens that are written read as a prompt's do: a chunk of them ends with its 16th.
"""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.config import part
from effjax.decoding.cache import EMPTY, Cache
from effjax.decoding.policies.policy import Look, Policy, Sizes
from effjax.errors import UsageError
from effjax.mixers.boundaries import BOUNDARIES, Boundaries, Similarity


@flax.struct.dataclass
class Chunks:
    """The chunks of a cache, each a run of slots that ends where the next begins.

    The fields are annotated `Any` because the same class also carries their shapes and shardings.

    Attributes:
      begins: `[B, C]` int, the first slot of each; the number of slots where there is no such chunk.
      sums: `[B, C, groups, D]` float32, of the keys.
      count: `[B, C]` float32, tokens.
      made: `[B]` int, how many there are.
    """

    begins: Any
    sums: Any
    count: Any
    made: Any


@dataclasses.dataclass(frozen=True)
class DHSA(Policy):
    """Keeps all tokens, and reads those of the chunks that suit the query.

    Attributes:
      budget: tokens that a query may read.
      local: of these the last ones, which are read in any case.
      block: queries of a prompt that choose together.
      chunk: mean length of a chunk; there are never more of them than that leaves room for.
      boundaries: where chunks begin, a kind in `effjax.mixers.boundaries`.
    """

    budget: int = 2048
    local: int = 128
    block: int = 128
    chunk: int = 16
    boundaries: Boundaries = part(BOUNDARIES, default=Similarity())

    def __post_init__(self) -> None:
        if not 0 <= self.local < self.budget or min(self.block, self.chunk) < 1:
            raise UsageError(
                f"budget={self.budget} must exceed local={self.local}, and block={self.block} and "
                f"chunk={self.chunk} must be at least 1."
            )
        if self.local < self.block > 1:
            raise UsageError(
                f"local={self.local} must be at least block={self.block}: every query of a block sees itself."
            )

    def attended(self, tokens: int) -> float:
        """The budget."""
        return float(min(self.budget, tokens))

    def begun(self, cache: Cache, sizes: Sizes) -> Cache:
        """An empty cache without chunks."""
        cache = super().begun(cache, sizes)
        chunks = sizes.slots // self.chunk + 2  # one more of the prompt, one more of what follows
        state = Chunks(
            begins=jnp.full((sizes.batch, chunks), sizes.slots, jnp.int32),
            sums=jnp.zeros((sizes.batch, chunks, sizes.groups, sizes.head_dim), jnp.float32),
            count=jnp.zeros((sizes.batch, chunks), jnp.float32),
            made=jnp.zeros((sizes.batch,), jnp.int32),
        )
        return dataclasses.replace(cache, state=state)

    def axes(self) -> Cache:
        """Names of the axes."""
        state = Chunks(
            begins=("batch", None),
            sums=("batch", None, "kv_heads", "head_dim"),
            count=("batch", None),
            made=("batch",),
        )
        return dataclasses.replace(super().axes(), state=state)

    def attend(
        self,
        cache: Cache,
        queries: Float[Array, "b n h d"],
        keys: Float[Array, "b n groups d"],
        values: Float[Array, "b n groups e"],
        positions: Int[Array, "b n"],
        look: Look,
    ) -> tuple[Float[Array, "b n h e"], Cache]:
        """Adds tokens, and lets blocks of them read what they choose."""
        if self.budget >= cache.slots:
            return super().attend(cache, queries, keys, values, positions, look)
        n = keys.shape[1]
        before = jnp.broadcast_to(cache.written, keys.shape[:1])  # [B]
        chunks = self.divided(cache.state, keys, positions, before)
        cache = dataclasses.replace(self.add(cache, keys, values, positions), state=chunks)
        valid = (positions >= 0)[:, :, None, None]
        told = jnp.where(valid, queries.astype(jnp.float32), 0.0)  # [B, N, H, D]

        def read(start: Int[Array, ""] | int, size: int) -> Float[Array, "b size h d"]:
            q = jnp.sum(jax.lax.dynamic_slice_in_dim(told, start, size, axis=1), axis=1)  # [B, H, D]
            q = jnp.mean(q.reshape(q.shape[0], keys.shape[2], -1, q.shape[2]), axis=2) * size**-0.5
            slots = self.chosen(chunks, q, before + start + size)  # [B, M, G]
            there = jnp.maximum(slots, 0)
            held = jnp.take_along_axis(cache.positions[:, :, None], there, axis=1)  # [B, M, G]
            held = jnp.where(slots < 0, EMPTY, held)
            k = self.storage.read_at(cache.keys, there).astype(keys.dtype)  # [B, M, G, D]
            v = self.storage.read_at(cache.values, there).astype(values.dtype)  # [B, M, G, D]
            return look(k, v, held, part=(start, size))[0]

        count, rest = divmod(n, self.block)
        parts = []
        if count == 1:
            parts.append(read(0, self.block))
        elif count:
            each = jax.lax.map(lambda i: read(i * self.block, self.block), jnp.arange(count))  # [N/.., B, ..]
            parts.append(jnp.moveaxis(each, 0, 1).reshape(each.shape[1], -1, *each.shape[3:]))
        if rest:
            parts.append(read(n - rest, rest))
        return (parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)), cache

    def divided(
        self,
        chunks: Chunks,
        keys: Float[Array, "b n groups d"],
        positions: Int[Array, "b n"],
        before: Int[Array, " b"],
    ) -> Chunks:
        """The chunks, with those that new tokens make or go on with.

        Args:
          chunks: of the tokens so far.
          keys: of the new tokens.
          positions: of the new tokens; padding belongs to no chunk.
          before: slots before them.
        """
        n, room = keys.shape[1], chunks.begins.shape[1]
        valid, rows = positions >= 0, jnp.arange(keys.shape[0])[:, None]
        if n == 1:
            last = jnp.take_along_axis(chunks.count, jnp.maximum(chunks.made - 1, 0)[:, None], axis=1)
            begins = valid & ((chunks.made[:, None] == 0) | (last >= self.chunk))  # [B, 1]
        else:
            first = valid & (jnp.cumsum(valid.astype(jnp.int32), axis=1) == 1)
            begins = first | (valid & self.boundaries.begins(keys, valid, self.chunk))  # [B, N]
        # Where a text in many pieces has made all chunks that there is room for, the last one grows.
        order = jnp.cumsum(begins.astype(jnp.int32), axis=1)  # [B, N]
        begins = begins & (chunks.made[:, None] + order <= room)
        made = chunks.made[:, None] + jnp.cumsum(begins.astype(jnp.int32), axis=1)  # [B, N]
        own = jnp.where(valid, made - 1, room)  # [B, N]
        slots = (before[:, None] + jnp.arange(n)[None]).astype(chunks.begins.dtype)
        return Chunks(
            begins=chunks.begins.at[rows, jnp.where(begins, own, room)].set(slots, mode="drop"),
            sums=chunks.sums.at[rows, own].add(keys.astype(jnp.float32), mode="drop"),
            count=chunks.count.at[rows, own].add(1.0, mode="drop"),
            made=made[:, -1],
        )

    def chosen(
        self, chunks: Chunks, q: Float[Array, "b groups d"], end: Int[Array, " b"]
    ) -> Int[Array, "b m groups"]:
        """The slots that are read by queries before slot `end`, negative for none."""
        far = jnp.maximum(end - self.local, 0)[:, None]  # [B, 1], the slots before it are chosen among
        stop = jnp.concatenate([jnp.minimum(chunks.begins[:, 1:], far), far], axis=1)  # [B, C]
        sizes = jnp.maximum(stop - chunks.begins, 0)  # [B, C]
        scale = jax.lax.rsqrt(jnp.maximum(chunks.count, 1.0))[:, :, None]  # [B, C, 1]
        scores = jnp.einsum("bgd,bcgd->bcg", q, chunks.sums) * scale  # [B, C, G]
        scores = jnp.where((sizes > 0)[:, :, None], scores, -jnp.inf)
        order = jnp.argsort(-scores, axis=1, stable=True)  # [B, C, G]
        sizes = jnp.take_along_axis(sizes[:, :, None], order, axis=1)  # [B, C, G]
        begins = jnp.take_along_axis(chunks.begins[:, :, None], order, axis=1)  # [B, C, G]
        stops = jnp.cumsum(sizes, axis=1)  # [B, C, G], tokens up to and with each chunk
        place = jnp.arange(self.budget - self.local)  # [R]
        find = functools.partial(jnp.searchsorted, v=place, side="right")
        which = jax.vmap(jax.vmap(find, 1, 1))(stops)  # [B, R, G]
        within = which < stops.shape[1]
        which = jnp.minimum(which, stops.shape[1] - 1)
        slot, taken = (jnp.take_along_axis(a, which, axis=1) for a in (begins, stops - sizes))  # [B, R, G]
        best = jnp.where(within, slot + place[None, :, None] - taken, -1)
        late = jnp.maximum((end - self.local)[:, None] + jnp.arange(self.local)[None], -1)  # [B, local]
        late = jnp.broadcast_to(late[:, :, None], (*late.shape, q.shape[1]))
        return jnp.concatenate([best, late], axis=1)  # [B, budget, G]
