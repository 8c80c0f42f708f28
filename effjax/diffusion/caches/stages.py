"""A denoiser in pieces, for caches that run some of its layers."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxtyping import Array

# What runs through the layers: a tree with the tokens as its field `x`.
Stream = Any


@dataclasses.dataclass(frozen=True)
class Stages:
    """A network as `finish(layers(begin(x_t, t, condition), None))`, with its parameters bound.

    Attributes:
      begin: `(x_t, t, condition) -> stream`, what enters the first layer; `t [B]` is the process's own time.
      layers: `(stream, (first, last)) -> stream`, the layers from the first to before the last; None is all.
      recall: `(stream, fresh [depth, branches], kept) -> (stream, kept)`, all layers, where a branch that is
        not fresh gives what was kept of it, `kept [depth, branches, *tokens]`.
      finish: `stream -> prediction`, in float32.
      depth: number of layers.
      branches: of a layer: what it adds to the stream one after the other.
    """

    begin: Callable[[Array, Array, Any], Stream]
    layers: Callable[[Stream, tuple[int, int] | None], Stream]
    recall: Callable[[Stream, Array, Array], tuple[Stream, Array]]
    finish: Callable[[Stream], Array]
    depth: int
    branches: int
