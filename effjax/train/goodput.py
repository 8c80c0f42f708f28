"""Where the wall time of a training loop goes.

    goodput = time of steps that were not done again / all wall time

One thing at a time is charged: what is entered within something else is taken from it. The host runs ahead
of the device by a few steps, and what a step takes shows where the host waits for it; a batch that is there
when it is asked for costs nothing, so that the time of `data` is what the device waits for.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Literal, get_args

Kind = Literal["starting", "compile", "data", "step", "evaluation", "checkpoint"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class WallTime:
    """Seconds by kind, from the moment it is made.

    Args:
      now: a monotonic clock in seconds.
      kind: charged where nothing is entered.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic, kind: Kind = "step") -> None:
        self._now, self._kind, self._since = now, kind, now()
        self._seconds: dict[str, float] = dict.fromkeys(KINDS, 0.0)

    @contextlib.contextmanager
    def spent(self, kind: Kind) -> Iterator[None]:
        """Charges what happens within to a kind."""
        before = self._switch(kind)
        try:
            yield
        finally:
            self._switch(before)

    @property
    def seconds(self) -> dict[str, float]:
        """Until now; they add up to all that has passed."""
        self._switch(self._kind)
        return {**self._seconds}

    def _switch(self, kind: Kind) -> Kind:
        now, before = self._now(), self._kind
        self._seconds[before] += now - self._since
        self._kind, self._since = kind, now
        return before
