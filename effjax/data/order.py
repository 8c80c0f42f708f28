"""The order of the examples: a permutation for each epoch, a function of the seed and the epoch alone."""

import threading

import numpy as np
from jaxtyping import Int


class EpochOrder:
    """Which example stands at which place of an epoch.

    The two epochs made last are kept, since the batches in flight straddle at most one border; anything else
    is computed again. A permutation takes 8 bytes an example, and the starts as many where there are lengths.

    Args:
      lengths: how long each example is, where places are counted in something smaller than examples (the
        tokens of a document). None where each example takes one place.
      count: how many examples there are.
      seed: of the whole run; None keeps the examples in their own order.
    """

    def __init__(self, count: int, seed: int | None, lengths: Int[np.ndarray, "examples"] | None = None):
        self._count = count
        self._seed = seed
        self._lengths = lengths
        self._kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._lock = threading.Lock()

    def of(self, epoch: int) -> Int[np.ndarray, "examples"]:
        """Returns the permutation: place in the epoch -> number of the example."""
        return self._get(epoch)[0]

    def starts(self, epoch: int) -> Int[np.ndarray, "examples_and_end"]:
        """Returns where the example at each place starts, in units of `lengths`, and where the last ends.

        Needs `lengths`: without them the place is the start.
        """
        return self._get(epoch)[1]

    def _get(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        with self._lock:
            if epoch not in self._kept:
                while len(self._kept) >= 2:
                    del self._kept[next(iter(self._kept))]
                self._kept[epoch] = self._compute(epoch)
            return self._kept[epoch]

    def _compute(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if self._seed is None:
            order = np.arange(self._count)
        else:
            order = np.random.Generator(np.random.PCG64([self._seed, epoch])).permutation(self._count)
        if self._lengths is None:
            return order, order[:0]
        return order, np.concatenate([[0], np.cumsum(self._lengths[order])])
