"""The slots that one step attended to most are what the next steps read.

    every S-th step:  y = p V over all slots;  R = top-K of max_h pool(p_h)        of the heads of a group
    between:          y = softmax(q K_R^T) V_R;  a new token takes the place in R that is worth least

Each layer and key/value head records its own R; nothing is ever evicted from the cache, so that what R lacks
comes back with the next full step. `pool` takes the largest weight among neighbouring slots, so that a phrase
is kept whole. A step that follows a prompt is full.

With a threshold a layer makes its full step only if, at the S-th step or at a multiple of it, the query has
turned away from that of its last full step: cos(mean_h q, mean_h q_full) < threshold.

Xu, Goyal and Choi, "Recycled Attention: Efficient inference for long-context language models",
arXiv:2411.05787; as published, "RefreshKV: Updating Small KV Cache During Long-form Generation", ACL 2025,
algorithm 1 and section 3: K an eighth of the prompt, S 5 or 10, pool 7, threshold 0.85 (Llama-3.1-8B) or 0.95
(Qwen2-7B).
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from effjax.decoding.cache import EMPTY, Cache
from effjax.decoding.policies.policy import Look, Policy, Sizes
from effjax.errors import UsageError

# Of a cache that has recorded nothing, and of a place in the record that holds nothing.
NOTHING = -1


@flax.struct.dataclass
class Recycled:
    """What a layer remembers of its last full step.

    The fields are annotated `Any` because the same class also carries their shapes and shardings.

    Attributes:
      slots: `[B, K, groups]` int, the recorded slots, those worth least last; negative for none.
      query: `[B, D]` float32, the mean query of that step.
      since: `[B]` int, steps since then; negative where there was none.
      unchecked: `[B]` int, steps since a full step was last considered.
    """

    slots: Any
    query: Any
    since: Any
    unchecked: Any


@dataclasses.dataclass(frozen=True)
class RecycledAttention(Policy):
    """Keeps all tokens, and reads most of the time a few.

    Every sequence of a batch makes its own full steps, whatever the others do. All slots are read as soon as
    one of them makes one: where they are out of step that is nearly always.

    Attributes:
      budget: K above, slots that a step between two full ones reads.
      stride: S above; 1 makes every step a full one.
      threshold: least similarity of queries at which a full step is left out; None leaves none out.
      pool: how many neighbouring slots share their largest weight when slots are chosen, an odd number.
    """

    budget: int = 2048
    stride: int = 10
    threshold: float | None = None
    pool: int = 7

    def __post_init__(self) -> None:
        if self.stride < 1:
            raise UsageError(f"stride={self.stride} must be at least 1 step.")
        if self.budget < self.stride:
            raise UsageError(
                f"budget={self.budget} slots do not hold the tokens of stride={self.stride} steps: give more."
            )
        if self.threshold is not None and not -1.0 <= self.threshold <= 1.0:
            raise UsageError(f"threshold={self.threshold} is compared with a cosine: give -1 to 1.")
        if self.pool < 1 or self.pool % 2 == 0:
            raise UsageError(f"pool={self.pool} must be an odd number of slots, 1 for each by itself.")

    def attended(self, tokens: int) -> float:
        """(L + (S - 1) K) / S, without a threshold; with one it is less."""
        return (tokens + (self.stride - 1) * min(self.budget, tokens)) / self.stride

    def begun(self, cache: Cache, sizes: Sizes) -> Cache:
        """An empty cache, and a record of nothing."""
        cache = super().begun(cache, sizes)
        state = Recycled(
            slots=jnp.full((sizes.batch, min(self.budget, sizes.slots), sizes.groups), NOTHING, jnp.int32),
            query=jnp.zeros((sizes.batch, sizes.head_dim), jnp.float32),
            since=jnp.full((sizes.batch,), NOTHING, jnp.int32),
            unchecked=jnp.zeros((sizes.batch,), jnp.int32),
        )
        return dataclasses.replace(cache, state=state)

    def axes(self) -> Cache:
        """Names of the axes."""
        state = Recycled(
            slots=("batch", "slots", "kv_heads"),
            query=("batch", "head_dim"),
            since=("batch",),
            unchecked=("batch",),
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
        """Adds tokens; several at once see everything, one sees everything or what is recorded."""
        if self.stride == 1 or self.budget >= cache.slots:
            return super().attend(cache, queries, keys, values, positions, look)
        before: Recycled = cache.state
        if keys.shape[1] > 1:
            y, cache = super().attend(cache, queries, keys, values, positions, look)
            forgotten = dataclasses.replace(before, since=jnp.full_like(before.since, NOTHING))
            return y, dataclasses.replace(cache, state=forgotten)
        new = jnp.broadcast_to(cache.written, keys.shape[:1])  # [B], where the token will lie
        cache = self.add(cache, keys, values, positions)
        query = jnp.mean(queries[:, 0].astype(jnp.float32), axis=1)  # [B, D]
        full, considered = self.decide(before, query)

        # What the branches return is small: the cache is written before, and no branch copies it.
        def whole() -> tuple[Array, Array, Array]:
            held = self.read(cache.keys, keys), self.read(cache.values, values)  # [B, S, G, D]
            y, weights = look(*held, cache.positions, tell=True)
            assert weights is not None
            return y, self.recorded(weights, cache.positions, keys.shape[2]), query

        def recycled() -> tuple[Array, Array, Array]:
            place = (self.budget - 1 - before.since) % self.budget  # [B]
            slots = before.slots.at[jnp.arange(len(new)), place].set(new[:, None])  # [B, K, G]
            there = jnp.maximum(slots, 0)
            held = jnp.take_along_axis(cache.positions[:, :, None], there, axis=1)  # [B, K, G]
            held = jnp.where(slots == NOTHING, EMPTY, held)
            k = self.storage.read_at(cache.keys, there).astype(keys.dtype)  # [B, K, G, D]
            v = self.storage.read_at(cache.values, there).astype(values.dtype)  # [B, K, G, D]
            return look(k, v, held)[0], slots, before.query

        def each() -> tuple[Array, ...]:
            def own(one: Array, other: Array) -> Array:
                return jnp.where(full.reshape(-1, *[1] * (one.ndim - 1)), one, other)

            return tuple(map(own, whole(), recycled()))

        y, slots, query = jax.lax.cond(jnp.any(full), each, recycled)
        state = Recycled(
            slots=slots,
            query=query,
            since=jnp.where(full, 0, before.since + 1),
            unchecked=jnp.where(considered, 0, before.unchecked + 1),
        )
        return y, dataclasses.replace(cache, state=state)

    def decide(
        self, before: Recycled, query: Float[Array, "b d"]
    ) -> tuple[Bool[Array, " b"], Bool[Array, " b"]]:
        """Returns for which sequences this step is full, and for which that was considered."""
        unknown = before.since == NOTHING
        considered = unknown | (before.unchecked == self.stride - 1)
        if self.threshold is None:
            return considered, considered
        lengths = jnp.linalg.norm(query, axis=1) * jnp.linalg.norm(before.query, axis=1)  # [B]
        alike = jnp.sum(query * before.query, axis=1) / jnp.maximum(lengths, 1e-12)  # [B]
        return unknown | (considered & (alike < self.threshold)), considered

    def recorded(
        self, weights: Float[Array, "b h 1 s"], held: Int[Array, "b s"], groups: int
    ) -> Int[Array, "b k groups"]:
        """The slots of largest weight for each group, best first."""
        b, h, _, s = weights.shape
        worth = jnp.max(weights.reshape(b, groups, h // groups, s), axis=2)  # [B, G, S]
        if self.pool > 1:
            window, strides = (1, 1, self.pool), (1, 1, 1)
            worth = jax.lax.reduce_window(worth, -jnp.inf, jax.lax.max, window, strides, "SAME")
        # A pool reaches over padding and what is empty: their slots are none.
        worth = jnp.where((held >= 0)[:, None, :], worth, NOTHING)
        best, slots = jax.lax.top_k(worth, self.budget)  # [B, G, K]
        return jnp.where(best < 0, NOTHING, slots).swapaxes(1, 2)
