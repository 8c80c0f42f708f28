"""What every cache policy can do; as it stands it keeps all tokens, and every query reads all of them.

    cache <- add(cache, k, v)
    y = p V,   p = softmax(q K^T + log size)            K, V = what is held
    cache <- what p teaches it                          where the policy watches: `looked`

A model whose `cache` is a policy decodes under it, with the parameters that it has:
`model.clone(cache=Window(64))`. The mixer says how queries look (`Look`): its scale, its mask, its sparsity;
the policy says what there is to be looked at.
"""

import dataclasses
from typing import Any, ClassVar, Protocol, runtime_checkable

from jaxtyping import Array, Bool, DTypeLike, Float, Int

from effjax.config import part
from effjax.decoding.cache import AXES, Cache, append, init_cache
from effjax.decoding.storage.kinds import STORAGES
from effjax.decoding.storage.plain import Plain
from effjax.decoding.storage.storage import Storage


@runtime_checkable
class Look(Protocol):
    """What the queries of the new tokens take from some slots: a mixer's own softmax, with its own mask."""

    def __call__(
        self,
        keys: Float[Array, "b s groups d"],
        values: Float[Array, "b s groups e"],
        held: Int[Array, "b s *groups"],
        size: Float[Array, "b s groups"] | None = None,
        among: Bool[Array, "#b #groups #n s"] | None = None,
        tell: bool = False,
        part: tuple[Int[Array, ""] | int, int] | None = None,
    ) -> tuple[Float[Array, "b n h e"], Float[Array, "b h n s"] | None]:
        """Returns what the heads take, and how much of each slot.

        Args:
          keys: of the slots.
          values: of the slots.
          held: their positions, negative for none; of all heads alike or of each group.
          size: how many tokens each stands for: its logarithm is added to the logits.
          among: which of them each query may see at all.
          tell: whether the weights are asked for, in float32; else None stands in their place.
          part: the first of the queries that look, and how many; None means all `n` of them.
        """


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a cache is asked for.

    Attributes:
      batch: sequences.
      slots: tokens that a sequence may have.
      groups: key/value heads.
      head_dim: channels of a head's keys.
      value_dim: channels of a head's values.
      dtype: of the model.
    """

    batch: int
    slots: int
    groups: int
    head_dim: int
    value_dim: int
    dtype: DTypeLike


@dataclasses.dataclass(frozen=True)
class Policy:
    """Keeps all.

    Attributes:
      storage: in which form keys and values are held, a kind in `effjax.decoding.storage.kinds`.
    """

    _: dataclasses.KW_ONLY
    storage: Storage = part(STORAGES, default=Plain())

    # Whether tokens that were written last can be taken back: `effjax.decoding.rewind`.
    rewinds: ClassVar[bool] = True

    def room(self, slots: int) -> int:
        """How many slots a sequence of up to `slots` tokens needs."""
        return slots

    def attended(self, tokens: int) -> float:
        """How many keys a decoding step reads on average, where the sequence has so many tokens."""
        return float(tokens)

    def init(
        self,
        batch: int,
        slots: int,
        groups: int,
        head_dim: int,
        dtype: DTypeLike,
        value_dim: int | None = None,
    ) -> Cache:
        """Makes the empty cache of one layer, for sequences of up to `slots` tokens.

        Args:
          batch: sequences.
          slots: tokens.
          groups: key/value heads.
          head_dim: channels of a head.
          dtype: of the model.
          value_dim: channels of a head's values; None means `head_dim`.
        """
        sizes = Sizes(batch, slots, groups, head_dim, value_dim or head_dim, dtype)
        cache = init_cache(batch, self.room(slots), groups, head_dim, dtype, self.storage, value_dim)
        return self.begun(cache, sizes)

    def begun(self, cache: Cache, sizes: Sizes) -> Cache:
        """An empty cache with what the policy remembers besides."""
        del sizes
        return cache

    def axes(self) -> Cache:
        """Names of the axes of that cache."""
        return dataclasses.replace(AXES, keys=self.storage.axes("keys"), values=self.storage.axes("values"))

    def attend(
        self,
        cache: Cache,
        queries: Float[Array, "b n h d"],
        keys: Float[Array, "b n groups d"],
        values: Float[Array, "b n groups e"],
        positions: Int[Array, "b n"],
        look: Look,
    ) -> tuple[Float[Array, "b n h e"], Cache]:
        """Adds `n` tokens to the cache, and lets them look at what is in it.

        Args:
          cache: what `init` made and earlier calls filled.
          queries: of the new tokens; `look` has them too.
          keys: of the new tokens.
          values: of the new tokens.
          positions: of the new tokens; negative for padding, which stands in front.
          look: what the new tokens take from slots.

        Returns:
          What the heads take from the values, and the cache.
        """
        cache = self.add(cache, keys, values, positions)
        held = self.read(cache.keys, keys), self.read(cache.values, values)  # [B, S, G, D]
        return self.looked(cache, *held, keys.shape[1], look)

    def add(
        self,
        cache: Cache,
        keys: Float[Array, "b n groups d"],
        values: Float[Array, "b n groups e"],
        positions: Int[Array, "b n"],
    ) -> Cache:
        """Puts new tokens into the cache."""
        return append(cache, keys, values, positions, self.storage)

    def looked(
        self,
        cache: Cache,
        keys: Float[Array, "b s groups d"],
        values: Float[Array, "b s groups e"],
        tokens: int,
        look: Look,
    ) -> tuple[Float[Array, "b n h e"], Cache]:
        """Lets all new tokens look at the slots; a policy may learn from how much of each they take.

        Args:
          cache: with the new tokens.
          keys: of its slots, as numbers.
          values: of its slots, as numbers.
          tokens: how many are new.
          look: what they take from slots.
        """
        return look(keys, values, cache.positions, cache.size)[0], cache  # [B, N, H, D]

    def read(self, held: Any, like: Float[Array, "b n groups d"]) -> Float[Array, "b s groups d"]:
        """All keys or values that are held, in the dtype of new ones."""
        return self.storage.read(held).astype(like.dtype)
