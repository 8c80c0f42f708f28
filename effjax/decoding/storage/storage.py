"""What every way of holding keys or values can do."""

from typing import Any, Literal, Protocol, runtime_checkable

from jaxtyping import Array, DTypeLike, Float, Int

What = Literal["keys", "values"]


@runtime_checkable
class Storage(Protocol):
    """Holds `[B, slots, groups, D]` numbers in a form of its own: a tree of arrays."""

    @property
    def rewinds(self) -> bool:
        """Whether slots that were written last can be written again as if they never were."""

    def empty(self, what: What, batch: int, slots: int, groups: int, head_dim: int, dtype: DTypeLike) -> Any:
        """Makes room for so many slots.

        Args:
          what: whether keys or values will be held; some forms treat them differently.
          batch: sequences.
          slots: of each sequence.
          groups: key/value heads.
          head_dim: channels of a head.
          dtype: of what `read` shall give.

        Raises:
          UsageError: for sizes that the form cannot hold.
        """

    def axes(self, what: What) -> Any:
        """Names of the axes of the arrays that `empty` makes, in a tree of the same form."""

    def append(
        self,
        held: Any,
        new: Float[Array, "b n groups d"],
        written: Int[Array, "*b"],
        count: Int[Array, " b"] | None = None,
    ) -> Any:
        """Writes `n` slots behind the first `written`, of all sequences or of each.

        Args:
          held: what is held.
          new: keys or values of the next slots.
          written: how many slots were written before.
          count: how many of the new ones are tokens, where padding stands behind them; None means all.
        """

    def put(self, held: Any, new: Float[Array, "b n groups d"], slots: Int[Array, "b n *groups"]) -> Any:
        """Writes these slots, the same of all heads or others of each group."""

    def read(self, held: Any) -> Float[Array, "b slots groups d"]:
        """All slots, as numbers."""

    def read_at(self, held: Any, slots: Int[Array, "b m *groups"]) -> Float[Array, "b m groups d"]:
        """These slots, as numbers."""
