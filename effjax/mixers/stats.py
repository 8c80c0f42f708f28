"""What a mixer can tell of its tokens, for methods that choose among them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
from jaxtyping import Array, Int


@flax.struct.dataclass
class Stats:
    """What was asked for; the rest is None.

    Attributes:
      features: `[B, N, C]`, what went into the mixer; before a block the residual stream.
      keys: `[B, N, G, D]`.
      values: `[B, N, G, D]`.
      attention: `[B, H, N, N]`, weights after the softmax, queries before keys.
      output: `[B, N, I]`, what the mixer computed, before it is projected back to the width.
    """

    features: Any
    keys: Any = None
    values: Any = None
    attention: Any = None
    output: Any = None


@dataclasses.dataclass(frozen=True)
class Watch:
    """What a mixer shall tell, and which tokens shall be mixed at all.

    Attributes:
      needs: fields of `Stats`.
      choose: from what is told to the places of the tokens that stay, None for all.
    """

    needs: tuple[str, ...]
    choose: Callable[[Stats], Int[Array, "b m"] | None] | None = None
