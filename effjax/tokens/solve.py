"""From "half of the MACs" to a schedule: a method's share is searched with the cost model."""

from collections.abc import Callable
from typing import TypeVar

from effjax.errors import UsageError
from effjax.tokens.amounts import with_keep

M = TypeVar("M")


def solve(method: M, macs_of: Callable[[M], int], whole: int, share: float, tolerance: float = 1e-3) -> M:
    """The method with the largest `keep` that needs at most `share` of the whole network's MACs.

    MACs fall with `keep`, in steps where a layer loses one more token; the search halves an interval.

    Args:
      method: any method with a `keep`, whose present value does not matter.
      macs_of: MACs of the network with a method.
      whole: MACs without any.
      share: of them that may be left, in (0, 1].
      tolerance: width of the last interval.

    Raises:
      UsageError: for a share outside (0, 1], or one that the method does not reach at its strongest.
    """
    if not 0 < share <= 1:
        raise UsageError(f"macs={share:g} is no share in (0, 1]: 0.5 leaves half of the work.")
    allowed = share * whole
    if macs_of(with_keep(method, 1.0)) <= allowed:
        return with_keep(method, 1.0)
    low, high = tolerance, 1.0
    if macs_of(with_keep(method, low)) > allowed:
        least = macs_of(with_keep(method, low)) / whole
        raise UsageError(
            f"{type(method).__name__} leaves at least {least:.0%} of the MACs, not {share:.0%}: "
            f"ask for more, or let more layers reduce."
        )
    while high - low > tolerance:
        middle = (low + high) / 2
        if macs_of(with_keep(method, middle)) <= allowed:
            low = middle
        else:
            high = middle
    return with_keep(method, low)
