"""Logical names of the axes of activations."""

import flax.linen as nn
from jaxtyping import Array, Float


def constrain(x: Float[Array, "*shape"], last: str | None = "features") -> Float[Array, "*shape"]:
    """Names the axes of a batch of vectors, sequences `[B, N, C]` or grids `[B, H, W, C]`, so that
    `effjax.parallel` may cut them."""
    places = {2: (), 3: ("length",), 4: ("height", "width"), 5: ("time", "height", "width")}
    return nn.with_logical_constraint(x, ("batch", *places[x.ndim], last))
