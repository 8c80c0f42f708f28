"""How far the host runs ahead of its devices.

A call of a compiled program returns before the program has run, so that a loop over batches hides the host's
own work behind the devices'. It needs a bound: what is sent ahead lies in the devices' memory, and where
one CPU plays several devices the launches of a program and the runs of those before it share their threads,
so that more than 32 in flight can shut each other out for good.
"""

import collections
from typing import Any

import jax


class Pace:
    """Called with each result of a loop, waits for the one that came `ahead` calls before it."""

    def __init__(self, ahead: int = 2) -> None:
        self._ahead = ahead
        self._running: collections.deque[Any] = collections.deque()

    def __call__(self, result: Any) -> None:
        """Takes a tree of arrays that must not be donated before their turn comes."""
        self._running.append(result)
        if len(self._running) > self._ahead:
            jax.block_until_ready(self._running.popleft())
