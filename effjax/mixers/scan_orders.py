"""Orders in which a sequence model reads a volume: the rotary major scan of LinGen.

    spatial_row       frame by frame, row by row         neighbours in a row follow each other
    spatial_column    frame by frame, column by column   neighbours in a column do
    temporal_row      row by row, place by place         the frames of a place do
    temporal_column   column by column, place by place   the same, over columns of places

Layers take them in turn, so that any two tokens that are neighbours along an axis follow each other in some
layer. An order is a permutation of the axes `[F, H, W]`: a transpose before the reshape and one behind it.

Source: Wang et al., "LinGen", CVPR 2025, figure 4.
"""

from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float

Order = Literal["spatial_row", "spatial_column", "temporal_row", "temporal_column"]

ORDERS: tuple[Order, ...] = get_args(Order)

# Which axis of [B, F, H, W, C] stands first, second and third; the last runs fastest.
_AXES: dict[Order, tuple[int, int, int]] = {
    "spatial_row": (1, 2, 3),
    "spatial_column": (1, 3, 2),
    "temporal_row": (2, 3, 1),
    "temporal_column": (3, 2, 1),
}


def in_line(x: Float[Array, "b f h w c"], order: Order) -> Float[Array, "b n c"]:
    """The tokens of a volume one after another."""
    turned = jnp.transpose(x, (0, *_AXES[order], 4))
    return turned.reshape(x.shape[0], -1, x.shape[-1])


def in_place(x: Float[Array, "b n c"], grid: tuple[int, int, int], order: Order) -> Float[Array, "b f h w c"]:
    """The inverse of `in_line`: the volume of `grid` frames, rows and columns."""
    axes = _AXES[order]
    turned = x.reshape(x.shape[0], *(grid[axis - 1] for axis in axes), x.shape[-1])
    back = [1 + axes.index(axis) for axis in (1, 2, 3)]
    return jnp.transpose(turned, (0, *back, 4))
