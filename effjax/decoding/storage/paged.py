"""Keys and values in pages: one pool for all sequences, and for each the list of the pages that it owns.

    slot s of sequence b  =  pool[table[b, s // page], s % page]

A sequence takes pages for the slots that it needs instead of room for the longest one that may come, and
gives them back when it ends. Kwon et al., "Efficient Memory Management for Large Language Model Serving with
PagedAttention", SOSP 2023, section 4; blocks of 16 tokens are the default of vLLM.

Who owns which page is planned outside (`effjax.decoding.serving.pages`). Here a slot without a page reads as
0, and what is written to it is dropped: no sequence ever touches what another one owns.
"""

import dataclasses
from typing import Any

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from effjax.decoding.storage.plain import Plain
from effjax.decoding.storage.storage import What
from effjax.errors import UsageError

# Stands in a table where there is no page. Behind all pages: a negative number would count from the end.
NONE = 2**30


@flax.struct.dataclass
class Pool:
    """Pages of all sequences.

    The fields are annotated `Any` because the same class also carries their shapes and shardings.

    Attributes:
      pages: `[P, page, groups, D]`, keys or values.
      table: `[B, slots / page]` int, the page of each run of slots; `NONE` where there is none.
    """

    pages: Any
    table: Any


@dataclasses.dataclass(frozen=True)
class Paged:
    """A pool of pages.

    Attributes:
      page: slots of a page.
      pages: of the pool, none of which belongs to anybody before `place`; None makes as many as all sequences
        can need, and gives each its own.
    """

    page: int = 16
    pages: int | None = None

    def __post_init__(self) -> None:
        if self.page < 1:
            raise UsageError(f"page={self.page} must be at least 1 slot.")
        if self.pages is not None and self.pages < 1:
            raise UsageError(f"pages={self.pages} must be at least 1, or None for as many as can be needed.")

    @property
    def rewinds(self) -> bool:
        """Every slot stands for itself."""
        return True

    def empty(self, what: What, batch: int, slots: int, groups: int, head_dim: int, dtype: DTypeLike) -> Pool:
        """Zeros."""
        if slots % self.page:
            raise UsageError(
                f"page={self.page} does not divide the {slots} slots of a sequence: take a page that does, "
                f"or {-(-slots // self.page) * self.page} slots."
            )
        each = slots // self.page
        count = batch * each if self.pages is None else self.pages
        own = jnp.arange(batch * each, dtype=jnp.int32).reshape(batch, each)
        return Pool(
            pages=Plain().empty(what, count, self.page, groups, head_dim, dtype),
            table=own if self.pages is None else jnp.full_like(own, NONE),
        )

    def axes(self, what: What) -> Pool:
        """Names of the axes."""
        return Pool(pages=("pages", "page", "kv_heads", "head_dim"), table=("batch", "slots"))

    def append(
        self,
        held: Pool,
        new: Float[Array, "b n groups d"],
        written: Int[Array, "*b"],
        count: Int[Array, " b"] | None = None,
    ) -> Pool:
        """Writes `n` slots behind the first `written`, of all sequences or of each."""
        batch, tokens = new.shape[:2]
        slots = held.table.shape[1] * self.page
        # Where there is no room the last slots are overwritten, as in one array.
        start = jnp.broadcast_to(jnp.clip(written, 0, slots - tokens), (batch,))
        return self.put(held, new, start[:, None] + jnp.arange(tokens)[None])

    def put(self, held: Pool, new: Float[Array, "b n groups d"], slots: Int[Array, "b n *groups"]) -> Pool:
        """Writes these slots, the same of all heads or others of each group."""
        pages = held.pages.at[self._index(held, slots)].set(new.astype(held.pages.dtype), mode="drop")
        return dataclasses.replace(held, pages=pages)

    def read(self, held: Pool) -> Float[Array, "b slots groups d"]:
        """All slots."""
        found = held.pages.at[held.table].get(mode="fill", fill_value=0)  # [B, S / page, page, G, D]
        return found.reshape(found.shape[0], -1, *found.shape[3:])

    def read_at(self, held: Pool, slots: Int[Array, "b m *groups"]) -> Float[Array, "b m groups d"]:
        """These slots, the same of all heads or others of each group."""
        return held.pages.at[self._index(held, slots)].get(mode="fill", fill_value=0)

    def place(
        self,
        held: Pool,
        row: Int[Array, ""],
        table: Int[Array, " each"],
        new: Float[Array, "slots groups d"],
    ) -> Pool:
        """Gives a sequence its pages, and fills them.

        Args:
          held: of all sequences.
          row: number of the sequence.
          table: its pages, `NONE` behind them.
          new: what its slots shall hold; what no page is there for is dropped.
        """
        filled = new.reshape(-1, self.page, *new.shape[1:]).astype(held.pages.dtype)
        return Pool(
            pages=held.pages.at[table].set(filled, mode="drop"),
            table=held.table.at[row].set(table),
        )

    def _index(self, held: Pool, slots: Int[Array, "b n *groups"]) -> tuple[Array, ...]:
        """Numbers of the page, the slot in it and, where heads differ, the group."""
        batch = jnp.arange(slots.shape[0]).reshape(-1, *(1,) * (slots.ndim - 1))
        # A slot that there is not is in no page: it is not written, as in one array.
        page = held.table.at[batch, slots // self.page].get(mode="fill", fill_value=NONE)
        at = page, slots % self.page
        return at if slots.ndim == 2 else (*at, jnp.arange(slots.shape[2])[None, None, :])
