"""Logical names of the axes of activations."""

import flax.linen as nn
from jaxtyping import Array, Float


def names_of(dimensions: int) -> tuple[str, ...]:
    """Names of all axes but the last of `[B, C]`, `[B, N, C]`, `[B, H, W, C]` or `[B, T, H, W, C]`."""
    places = {2: (), 3: ("length",), 4: ("height", "width"), 5: ("time", "height", "width")}
    return ("batch", *places[dimensions])


def constrain(x: Float[Array, "*shape"], last: str | None = "features") -> Float[Array, "*shape"]:
    """Names the axes of a batch of vectors, sequences `[B, N, C]` or grids `[B, H, W, C]`, so that
    `effjax.parallel` may cut them."""
    return nn.with_logical_constraint(x, (*names_of(x.ndim), last))
