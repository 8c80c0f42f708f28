"""What relative positions inside a window add to the logits.

Each kind is a Linen module that maps `(window, span, heads)` to a bias `[heads, places, places]`: the window
on this map, the side of the window that the parameters are made for, and the heads.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.layers.dense import named, truncated_normal, zeros
from effjax.mixers.windows import Window, offsets


class RelativeTable(nn.Module):
    """B_qk = table[row_q - row_k, column_q - column_k], a learned value a head.

    Source: Swin Transformer, Liu et al. 2021, equation 4. The table of a window of M x M holds (2 M - 1)^2
    rows; a map smaller than the window reads those in its middle.
    """

    @nn.compact
    def __call__(self, window: Window, span: int, heads: int) -> Float[Array, "h places places"]:
        """Reads the table at every pair of places."""
        init = named(truncated_normal(0.02), (None, "heads"))
        side = 2 * span - 1
        table = self.param("table", init, (side**2, heads), jnp.float32)
        row, column = offsets(window)[..., 0], offsets(window)[..., 1]
        index = (row + span - 1) * side + column + span - 1  # [places, places]
        return jnp.moveaxis(table[index], -1, 0)  # [H, places, places]


class DistanceTable(nn.Module):
    """B_qk = table[|row_q - row_k|, |column_q - column_k|], a learned value a head that begins at zero.

    Source: LeViT, Graham et al. 2021, section 4.2, figure 4; M^2 rows for maps of at most M x M.
    """

    @nn.compact
    def __call__(self, window: Window, span: int, heads: int) -> Float[Array, "h places places"]:
        """Reads the table at every pair of places."""
        table = self.param("table", named(zeros, (None, "heads")), (span**2, heads), jnp.float32)
        row, column = abs(offsets(window)[..., 0]), abs(offsets(window)[..., 1])
        return jnp.moveaxis(table[row * span + column], -1, 0)  # [H, places, places]


KINDS = {"distance_table": DistanceTable, "relative_table": RelativeTable}
