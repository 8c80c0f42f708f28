"""Neighbours with like keys become one key and one value.

    sets      runs of neighbours with cos(k_i, k_{i+1}) > epsilon
    pivot p   the token of a set that was attended to most
    g_i       exp(-||k_p - k_i||^2 / (2 sigma^2)),   sigma = mean of ||k_p - k_i|| over i != p, / sqrt(2)
    merged    k = sum_i w_i k_i,   v = sum_i w_i v_i,   w_i = g_i / sum_j g_j

The first tokens, the latest and those that were attended to most stay as they are. Every layer and key/value
head has sets of its own. Wang, Jin, Yu and Zhang, "Model Tells You Where to Merge: Adaptive KV Cache Merging
for LLMs on Long-Context Tasks" (KVMerger), 2024, arXiv:2407.08454, section 4 and algorithm 1: a walk from the
last token to the first, which takes a token into the set of the one behind it where they are alike enough.
How sigma is printed there refers to itself, and first tokens are not kept there: both are ours, as is merging
while tokens are written, of which nothing was to be read.

Slots are merged when no more tokens fit, in one go and down to `budget - reserve`, so that the next `reserve`
steps find room; a slot of s tokens counts s times in all sums. Where epsilon alone leaves too many sets, a
head's threshold sinks until they fit. With as many slots as tokens this is the cache that keeps all.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from effjax.decoding.cache import EMPTY, Cache
from effjax.decoding.policies.evicting import Evicting, numbers, of_each_head
from effjax.decoding.policies.policy import Look, Sizes
from effjax.decoding.policies.taken import look_and_sum
from effjax.decoding.storage.plain import Plain
from effjax.errors import UsageError

# How much a cut between two neighbours counts: like keys may be merged, heavy tokens where there is no other
# way, first and latest tokens never.
LIKE, HEAVY, ALONE = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class KVMerger(Evicting):
    """Holds `budget` slots of one or more tokens.

    Attributes:
      epsilon: neighbours are merged whose keys have a larger cosine; -1 to 1.
      sinks: first tokens of each sequence that stay as they are.
      recent: latest tokens that stay as they are; None means a third of the budget.
      heavy: other slots that stay as they are where there is room, those of the largest score; None means a
        quarter of the budget.
      reserve: slots that are free after merging; None means an eighth of the budget.
      proportional: whether a slot of s tokens is attended to s times: log s is added to its logits.
    """

    epsilon: float = 0.75
    sinks: int = 4
    recent: int | None = None
    heavy: int | None = None
    reserve: int | None = None
    proportional: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1.0 <= self.epsilon <= 1.0:
            raise UsageError(f"epsilon={self.epsilon} must be a cosine, between -1 and 1.")
        recent, heavy, reserve = self.amounts()
        for name, amount, least in (
            ("sinks", self.sinks, 0),
            ("recent", recent, 1),
            ("heavy", heavy, 0),
            ("reserve", reserve, 1),
        ):
            if amount < least:
                raise UsageError(f"{name}={amount} must be at least {least}.")
        if self.sinks + recent + 1 > self.budget - reserve:
            raise UsageError(
                f"budget={self.budget} slots hold no merged ones beside sinks={self.sinks}, recent={recent} "
                f"and reserve={reserve}: give more slots."
            )

    def amounts(self) -> tuple[int, int, int]:
        """How many tokens are recent and heavy, and how many slots are free after merging."""
        recent = max(self.budget // 3, 1) if self.recent is None else self.recent
        heavy = self.budget // 4 if self.heavy is None else self.heavy
        return recent, heavy, max(self.budget // 8, 1) if self.reserve is None else self.reserve

    def begun(self, cache: Cache, sizes: Sizes) -> Cache:
        """An empty cache with scores and sizes."""
        cache = super().begun(cache, sizes)
        one, none = (numbers(sizes.batch, cache.slots, sizes.groups, fill) for fill in (1.0, 0.0))
        return of_each_head(cache, sizes.groups, size=one, score=none)

    def axes(self) -> Cache:
        """Names of the axes."""
        each = ("batch", "slots", "kv_heads")
        return dataclasses.replace(super().axes(), positions=each, score=each, size=each)

    def attend(
        self,
        cache: Cache,
        queries: Float[Array, "b n h d"],
        keys: Float[Array, "b n groups d"],
        values: Float[Array, "b n groups e"],
        positions: Int[Array, "b n"],
        look: Look,
    ) -> tuple[Float[Array, "b n h e"], Cache]:
        """Adds tokens behind the others; what does not fit is read whole, then merged."""

        def roomy(cache: Cache) -> tuple[Array, Cache]:
            cache = self.add(cache, keys, values, positions)
            held = self.read(cache.keys, keys), self.read(cache.values, values)  # [B, S, G, D]
            return self.looked(cache, *held, keys.shape[1], look)

        def crowded(cache: Cache) -> tuple[Array, Cache]:
            whole = self.beside(cache, keys, values, positions)  # S + N slots
            y, whole = self.looked(whole, whole.keys, whole.values, keys.shape[1], look)
            many = jnp.sum(whole.positions >= 0, axis=1) > cache.slots  # [B, G]
            return y, self._hold(cache, self.merged(whole, many, cache.slots), jnp.ones_like(many))

        count = keys.shape[1]
        if count > cache.slots:
            return crowded(cache)
        if count > 1:
            fits = jnp.all(filled(cache.positions) + count <= cache.slots)
            return jax.lax.cond(fits, roomy, crowded, cache)
        # A loop that runs once or not at all: other than a condition it copies nothing when it does not.
        full = lambda cache: jnp.any(filled(cache.positions) == cache.slots)  # noqa: E731
        return roomy(jax.lax.while_loop(full, self.make_room, cache))

    def looked(
        self,
        cache: Cache,
        keys: Float[Array, "b s groups d"],
        values: Float[Array, "b s groups e"],
        tokens: int,
        look: Look,
    ) -> tuple[Float[Array, "b n h e"], Cache]:
        """Adds to the scores what is taken now."""
        size = cache.size if self.proportional else None
        y, taken = look_and_sum(look, keys, values, cache.positions, size, tokens)  # [B, N, H, D]
        return y, dataclasses.replace(cache, score=cache.score + taken)

    def add(
        self,
        cache: Cache,
        keys: Float[Array, "b n groups d"],
        values: Float[Array, "b n groups e"],
        positions: Int[Array, "b n"],
    ) -> Cache:
        """Puts new tokens behind what each head holds."""
        slots = filled(cache.positions)[:, None] + jnp.arange(keys.shape[1])[None, :, None]  # [B, N, G]
        return self.place(cache, keys, values, positions, slots)

    def make_room(self, cache: Cache) -> Cache:
        """Merges slots of those heads that have none free; the others are not touched."""
        read = self.storage.read
        whole = dataclasses.replace(cache, keys=read(cache.keys), values=read(cache.values))
        many = jnp.sum(cache.positions >= 0, axis=1) >= cache.slots  # [B, G]; else padding is in the way
        merged = self.merged(whole, many, cache.slots)
        return self._hold(cache, merged, filled(cache.positions) == cache.slots)

    def merged(self, whole: Cache, many: Bool[Array, "b groups"], slots: int) -> Cache:
        """A plain cache with its tokens in front, in order, and merged where there are many.

        Args:
          whole: any number of slots, in plain form.
          many: which heads have more tokens than they may; of others padding goes, and nothing else.
          slots: of the cache that is made.
        """
        order = jnp.argsort(whole.positions < 0, axis=1, stable=True)  # [B, N, G], what is held first
        names = ("keys", "values", "positions", "size", "score")
        tidy = {name: Plain().read_at(getattr(whole, name), order) for name in names}
        positions = tidy["positions"]
        held = positions >= 0  # [B, N, G]

        recent, heavy, reserve = self.amounts()
        newest = jnp.max(positions, axis=1, keepdims=True)  # [B, 1, G]
        alone = held & ((positions < self.sinks) | (positions > newest - recent))  # [B, N, G]
        most_taken = largest(jnp.where(held & ~alone, tidy["score"], -jnp.inf), heavy)
        ranks = jnp.where(alone, ALONE, jnp.where(most_taken, HEAVY, LIKE))  # [B, N, G]

        likeness = neighbour_similarity(tidy["keys"])  # [B, N, G]
        begins = begin_sets(likeness, ranks, held, self.epsilon, max(slots - reserve, 1))
        begins = jnp.where(many[:, None], begins, held)  # [B, N, G]
        sets = jnp.where(held, jnp.cumsum(begins, axis=1) - 1, slots)  # [B, N, G], none where nothing is
        keys, values = merge_sets(tidy["keys"], tidy["values"], tidy["size"], tidy["score"], sets, slots)

        total = over_sets(jax.ops.segment_sum, sets, slots)
        tokens = total(jnp.where(held, tidy["size"], 0.0))  # [B, S, G]
        last = over_sets(jax.ops.segment_max, sets, slots)(positions)  # [B, S, G]
        return dataclasses.replace(
            whole,
            keys=keys,
            values=values,
            # Of all tokens of a set: who may see the last may see all.
            positions=jnp.where(tokens > 0, last, EMPTY),
            size=jnp.where(tokens > 0, tokens, 1.0),
            score=total(tidy["score"]),
        )

    def _hold(self, cache: Cache, merged: Cache, where: Bool[Array, "b groups"]) -> Cache:
        """A plain cache of as many slots in the form of `cache`, for some heads."""
        # Where a head is left as it is, the slots are out of range: nothing is written.
        slots = jnp.where(where[:, None], jnp.arange(cache.slots)[None, :, None], cache.slots)  # [B, S, G]
        put = Plain().put
        return dataclasses.replace(
            cache,
            keys=self.storage.put(cache.keys, merged.keys, slots),
            values=self.storage.put(cache.values, merged.values, slots),
            positions=put(cache.positions, merged.positions, slots),
            size=put(cache.size, merged.size, slots),
            score=put(cache.score, merged.score, slots),
            written=merged.written,
        )


def filled(positions: Int[Array, "b slots groups"]) -> Int[Array, "b groups"]:
    """How many slots of each head there are up to the last token."""
    ends = jnp.arange(1, positions.shape[1] + 1, dtype=positions.dtype)[None, :, None]
    return jnp.max(jnp.where(positions >= 0, ends, 0), axis=1)


def largest(x: Float[Array, "b n groups"], count: int) -> Bool[Array, "b n groups"]:
    """Which are the `count` largest along the slots, of like ones the first; never -inf."""
    places = jnp.argsort(jnp.argsort(-x, axis=1, stable=True), axis=1)
    return (places < count) & (x > -jnp.inf)


def neighbour_similarity(keys: Float[Array, "b n groups d"]) -> Float[Array, "b n groups"]:
    """Cosine of each key and the one before it, never above 1; -1 for the first."""
    keys = keys.astype(jnp.float32)
    unit = keys * jax.lax.rsqrt(jnp.maximum(jnp.sum(keys**2, axis=-1, keepdims=True), 1e-30))
    cosine = jnp.sum(unit[:, 1:] * unit[:, :-1], axis=-1)  # [B, N - 1, G]
    return jnp.pad(jnp.clip(cosine, -1.0, 1.0), ((0, 0), (1, 0), (0, 0)), constant_values=-1.0)


def begin_sets(
    likeness: Float[Array, "b n groups"],
    ranks: Int[Array, "b n groups"],
    held: Bool[Array, "b n groups"],
    epsilon: float,
    most: int,
) -> Bool[Array, "b n groups"]:
    """Where a set begins: tokens up to the next beginning are one.

    Args:
      likeness: of each key and the one before it.
      ranks: how much it counts that a token stays alone: `LIKE`, `HEAVY` or `ALONE`.
      held: where there is a token; these stand in front.
      epsilon: neighbours that are no more alike are parted.
      most: how many sets there may be at most: beyond that the least alike stay parted, by rank.
    """
    between = jnp.maximum(ranks, jnp.pad(ranks[:, :-1], ((0, 0), (1, 0), (0, 0))))  # of a token and before
    first = (jnp.arange(likeness.shape[1]) == 0)[None, :, None]
    parted = held & (first | (between > LIKE) | (likeness <= epsilon))
    # Cosines span 2: a rank outweighs them, and that there is a first set outweighs ranks.
    worth = 3.0 * jnp.where(first, ALONE + 1, between) - likeness
    return largest(jnp.where(parted, worth, -jnp.inf), most)


def over_sets(
    fold: Callable[..., Array], sets: Int[Array, "b n groups"], count: int
) -> Callable[[Array], Array]:
    """A function of `[B, N, G, ...]` that folds the slots of each set of each head: `[B, count, G, ...]`."""
    head = lambda x, which: fold(x, which, count)  # noqa: E731
    return lambda x: jax.vmap(jax.vmap(head, 1, 1))(x, sets)


def merge_sets(
    keys: Float[Array, "b n groups d"],
    values: Float[Array, "b n groups e"],
    size: Float[Array, "b n groups"],
    score: Float[Array, "b n groups"],
    sets: Int[Array, "b n groups"],
    count: int,
) -> tuple[Float[Array, "b m groups d"], Float[Array, "b m groups e"]]:
    """Keys and values of the sets; a set of one is bit for bit as it was.

    Args:
      keys: of the slots.
      values: of the slots.
      size: how many tokens each stands for.
      score: how much each was attended to; the pivot of a set has the most.
      sets: number of each slot's set; `count` or more for those in none.
      count: of the sets.
    """
    total = over_sets(jax.ops.segment_sum, sets, count)
    at = jnp.broadcast_to(jnp.arange(sets.shape[1])[None, :, None], sets.shape)
    top = over_sets(jax.ops.segment_max, sets, count)(score)  # [B, M, G]
    of_set = lambda x: Plain().read_at(x, jnp.minimum(sets, count - 1))  # noqa: E731

    candidates = jnp.where(score >= of_set(top), at, sets.shape[1] - 1)
    pivots = over_sets(jax.ops.segment_min, sets, count)(candidates)  # [B, M, G]
    pivots = jnp.minimum(pivots, sets.shape[1] - 1)  # of sets that are empty anything
    is_pivot = at == of_set(pivots)  # [B, N, G]

    wide = keys.astype(jnp.float32)
    apart = jnp.sum((wide - of_set(Plain().read_at(wide, pivots))) ** 2, axis=-1)  # [B, N, G]
    others = jnp.where(is_pivot, 0.0, size)
    mean = total(others * jnp.sqrt(apart)) / jnp.maximum(total(others), 1.0)  # [B, M, G]
    spread = of_set(mean**2)  # 2 sigma^2
    kernel = jnp.exp(-apart / jnp.where(spread > 0, spread, 1.0))  # [B, N, G]
    weights = size * kernel
    weights = (weights / of_set(jnp.maximum(total(weights), 1e-30)))[..., None]  # [B, N, G, 1]
    merged = total(weights * wide), total(weights * values.astype(jnp.float32))  # [B, M, G, D]
    return merged[0].astype(keys.dtype), merged[1].astype(values.dtype)
