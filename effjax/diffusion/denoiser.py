"""What a sampler calls at every step: a trained network, which may remember earlier steps.

    (prediction, memory) <- predict(x_t, t, condition, memory)

A plain network has no memory. A step cache keeps features in it and skips work; the memory travels through
the sampler's scan, so everything stays a pure function.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxtyping import Array

# What a picture should show: labels `[B]`, or any tree whose leaves have the batch in front.
Condition = Any
Memory = Any


def _nothing(x: Array, t: Array, condition: Condition) -> Memory:
    return None


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A network behind a process, in float32.

    Attributes:
      predict: `(x_t, t, condition, memory) -> (prediction, memory)`; `t [B]` is the process's own time.
      start: `(x, t, condition) -> memory`, the memory before the first step, which is at `t [B]`; None where
        there is none.
    """

    predict: Callable[[Array, Array, Condition, Memory], tuple[Array, Memory]]
    start: Callable[[Array, Array, Condition], Memory] = _nothing


def memoryless(network: Callable[[Array, Array, Condition], Array]) -> Denoiser:
    """A denoiser from a function `(x_t, t, condition) -> prediction`."""
    return Denoiser(lambda x_t, t, condition, memory: (network(x_t, t, condition), memory))
