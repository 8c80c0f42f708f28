"""Who owns which page of a pool: the plan beside `effjax.decoding.storage.paged`."""

from collections.abc import Iterable

from effjax.errors import UsageError


class Pages:
    """Pages of one pool, each free or somebody's.

    Args:
      count: pages of the pool.
    """

    def __init__(self, count: int) -> None:
        if count < 1:
            raise UsageError(f"pages={count} must be at least 1.")
        self.count = count
        # The last one given back is the next one taken.
        self._free = list(range(count - 1, -1, -1))
        self._taken: set[int] = set()

    @property
    def free(self) -> int:
        """How many belong to nobody."""
        return len(self._free)

    def take(self, count: int) -> tuple[int, ...] | None:
        """So many pages, or None where fewer are free: then nothing is taken."""
        if count > len(self._free):
            return None
        pages = tuple(self._free.pop() for _ in range(count))
        self._taken.update(pages)
        return pages

    def give(self, pages: Iterable[int]) -> None:
        """Takes pages back.

        Raises:
          ValueError: for a page that was not taken, before any is taken back.
        """
        pages = tuple(pages)
        if strange := sorted(set(pages) - self._taken) or len(set(pages)) < len(pages):
            raise ValueError(f"pages {strange or pages} are given back, and nobody took them.")
        self._taken.difference_update(pages)
        self._free.extend(pages)
