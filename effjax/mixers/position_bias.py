"""What relative positions inside a window add to the logits.

Each kind is a Linen module that maps `(window, span, heads)` to a bias `[heads, places, places]`: the window
on this map, the window that the parameters are made for, and the heads.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from effjax.layers.dense import Dense, named, truncated_normal, zeros
from effjax.mixers.windows import Window, offsets, sides


class RelativeTable(nn.Module):
    """B_qk = table[row_q - row_k, column_q - column_k], a learned value a head.

    Source: Swin Transformer, Liu et al. 2021, equation 4. The table of a window of M x M holds (2 M - 1)^2
    rows; a map smaller than the window reads those in its middle.
    """

    @nn.compact
    def __call__(self, window: Window, span: Window, heads: int) -> Float[Array, "h places places"]:
        """Reads the table at every pair of places."""
        init = named(truncated_normal(0.02), (None, "heads"))
        rows = (2 * span[0] - 1) * (2 * span[1] - 1)
        table = self.param("table", init, (rows, heads), jnp.float32)
        return at_offsets(jnp.asarray(table), window, span)


class DistanceTable(nn.Module):
    """B_qk = table[|row_q - row_k|, |column_q - column_k|], a learned value a head that begins at zero.

    Source: LeViT, Graham et al. 2021, section 4.2, figure 4; M^2 rows for maps of at most M x M.
    """

    @nn.compact
    def __call__(self, window: Window, span: Window, heads: int) -> Float[Array, "h places places"]:
        """Reads the table at every pair of places."""
        table = self.param("table", named(zeros, (None, "heads")), (span[0] * span[1], heads), jnp.float32)
        row, column = abs(offsets(window)[..., 0]), abs(offsets(window)[..., 1])
        return jnp.moveaxis(jnp.asarray(table)[row * span[1] + column], -1, 0)  # [H, places, places]


class InterpolatedTable(nn.Module):
    """The table of one window, resized bilinearly to the offsets of any other: MOAT, Yang et al. 2023.

    Its code makes tables for the maps of 224 pixels, 14 and 7 places, and keeps them that size where maps
    grow, so that weights serve all sizes.

    Attributes:
      side: of the window that the table is made for.
    """

    side: int

    @nn.compact
    def __call__(self, window: Window, span: Window, heads: int) -> Float[Array, "h places places"]:
        """Resizes the table to the offsets of this window, and reads it at every pair of places."""
        init = named(truncated_normal(0.02), (None, "heads"))
        rows = 2 * self.side - 1
        table = jnp.asarray(self.param("table", init, (rows**2, heads), jnp.float32))
        if window != (self.side, self.side):
            resized = 2 * window[0] - 1, 2 * window[1] - 1, heads
            table = table.reshape(rows, rows, heads)
            table = jax.image.resize(table, resized, "bilinear", antialias=False).reshape(-1, heads)
        return at_offsets(table, window, window)


class LogSpacedContinuous(nn.Module):
    """B = 16 sigmoid(W_2 relu(W_1 z + b)), z = sign(x) log2(1 + 8 |x|) / log2(8), x = offset / (M - 1).

    A small network that knows any offset, so that weights go from one window to another; distances in
    logarithms keep those of a larger window near those that were trained. Source: Swin Transformer V2, Liu et
    al. 2022, section 3.3; the sigmoid and the factors 8 and 16 are those of its code.

    Attributes:
      hidden: channels between the two layers.
      trained: the window M that offsets are divided by, that of training; None is the window at hand.
      bound: the largest bias.
    """

    hidden: int = 512
    trained: int | tuple[int, int] | None = None
    bound: float = 16.0

    @nn.compact
    def __call__(self, window: Window, span: Window, heads: int) -> Float[Array, "h places places"]:
        """Evaluates the network once an offset, and reads it at every pair of places."""
        trained = sides(window if self.trained is None else self.trained)
        places = jnp.asarray(coordinates(window, trained))  # [offsets, 2]
        small = truncated_normal(0.02)
        h = Dense(self.hidden, (None, "mlp"), kernel_init=small, name="expand")(places)  # [offsets, F]
        table = Dense(heads, ("mlp", "heads"), use_bias=False, kernel_init=small, name="contract")(nn.relu(h))
        return at_offsets(self.bound * jax.nn.sigmoid(table), window, window)


def coordinates(window: Window, trained: Window) -> Float[np.ndarray, "offsets 2"]:
    """The offsets of a window, row by row from the most negative, in logarithms: 1 is M - 1 places."""
    axes = (
        np.arange(1 - m, m, dtype=np.float32) / max(t - 1, 1) for m, t in zip(window, trained, strict=True)
    )
    x = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
    return np.sign(x) * np.log2(1 + 8 * np.abs(x), dtype=np.float32) / np.float32(math.log2(8))


def at_offsets(
    table: Float[Array, "offsets h"], window: Window, span: Window
) -> Float[Array, "h places places"]:
    """Reads a table of the offsets of `span`, row by row, at every pair of places of `window`."""
    row, column = offsets(window)[..., 0], offsets(window)[..., 1]
    index = (row + span[0] - 1) * (2 * span[1] - 1) + column + span[1] - 1  # [places, places]
    return jnp.moveaxis(table[index], -1, 0)  # [H, places, places]


KINDS = {
    "distance_table": DistanceTable,
    "interpolated_table": InterpolatedTable,
    "log_spaced_continuous": LogSpacedContinuous,
    "relative_table": RelativeTable,
}
