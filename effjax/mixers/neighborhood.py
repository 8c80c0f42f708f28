"""Attention of every place to its k x k nearest places, and to those at a stride around it.

    y_i = sum_j p_ij v_j,    p_ij = softmax_j(q_i k_j / sqrt(d) + B_{j - i}),    j in the neighbourhood of i
    NA     rows clip(i - k // 2, 0, H - k) .. + k - 1, and columns alike: at the edges it is shifted inwards
    DiNA   NA on each of the d x d sub-grids of places that are d apart

Every place has k^2 neighbours, and B is a learned table of the (2 k - 1)^2 offsets. A map that is smaller
than k d places gets zeros below and to the right, which take part, as in the reference.

Gathering the neighbours of every place would copy keys and values k^2 times. Here queries stand in tiles of
about k x k, each with the (2 k - 1)^2 keys that any of them sees, and a mask: keys are copied about four
times, logits are four times as many, and all is batched matrix products.

Source: Neighborhood Attention Transformer, Hassani et al. 2023, section 3; Dilated Neighborhood Attention
Transformer, Hassani and Shi 2022, section 3.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from effjax.errors import UsageError
from effjax.layers.dense import Dense, named, truncated_normal
from effjax.mixers.context import Context
from effjax.mixers.neighbor_kernel import Implementation, by_kernel

Map = Float[Array, "b height width h d"]
Tiled = Float[Array, "b grids tiles h places d"]


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How one side of a map is cut: known when a program is traced.

    Attributes:
      length: places of a sub-grid; those of the last ones of an uneven map lack one.
      tile: queries of a tile.
      starts: where the keys of each tile begin.
      offsets: from each query to each key of a tile, for each sub-grid, or for one where all are alike.
      allowed: which of these are neighbours.
    """

    length: int
    tile: int
    starts: tuple[int, ...]
    offsets: Int[np.ndarray, "grids tiles tile span"]
    allowed: Bool[np.ndarray, "grids tiles tile span"]

    @property
    def span(self) -> int:
        """Keys of a tile."""
        return self.allowed.shape[-1]


def tiles(side: int, kernel: int, dilation: int) -> Tiles:
    """Cuts a side of at least `kernel * dilation` places; short sub-grids are one tile."""
    length = -(-side // dilation)
    count = 1 if length <= 2 * kernel else round(length / kernel)
    tile = -(-length // count)
    span = min(tile + kernel - 1, length)
    starts = np.clip(np.arange(count) * tile - kernel // 2, 0, length - span)
    lengths = np.array([-(-(side - r) // dilation) for r in range(dilation)])
    lengths = lengths[:1] if (lengths == length).all() else lengths
    query = np.arange(count * tile).reshape(1, count, tile, 1)
    key = (starts[:, None] + np.arange(span)).reshape(1, count, 1, span)
    first = np.clip(query - kernel // 2, 0, lengths.reshape(-1, 1, 1, 1) - kernel)
    allowed = (key >= first) & (key < first + kernel)  # [grids, tiles, tile, span]
    offsets = np.broadcast_to(key - query, allowed.shape)
    return Tiles(length, tile, tuple(starts.tolist()), offsets, allowed)


def neighborhood_attention(
    q: Map,
    k: Map,
    v: Map,
    *,
    kernel: int,
    dilation: int = 1,
    table: Float[Array, "offsets offsets h"] | None = None,
) -> Map:
    """Softmax attention to neighbours; logits in float32, scaled by 1 / sqrt(d).

    Args:
      q: queries.
      k: keys.
      v: values.
      kernel: side of the neighbourhood, odd.
      dilation: distance of neighbours.
      table: the bias by rows and columns from a query to a key, `kernel - 1` in its middle.

    Raises:
      UsageError: for an even kernel, or a map smaller than `kernel * dilation`.
    """
    _, height, width, _, dims = q.shape
    if kernel % 2 == 0 or min(height, width) < kernel * dilation:
        raise UsageError(
            f"a neighbourhood of {kernel} x {kernel} places, {dilation} apart, must have an odd side and "
            f"fit on the map of {height} x {width}."
        )
    rows, columns = tiles(height, kernel, dilation), tiles(width, kernel, dilation)
    cut = functools.partial(_tiled, dilation=dilation, rows=rows, columns=columns)
    q, k, v = cut(q * dims**-0.5, _queries), cut(k, _keys), cut(v, _keys)  # [B, grids, tiles, H, places, D]
    logits = jnp.einsum("bgthqd,bgthkd->bgthqk", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits + _bias(table, kernel, rows, columns)[None], axis=-1).astype(v.dtype)
    y = jnp.einsum("bgthqk,bgthkd->bgthqd", weights, v)  # [B, grids, tiles, H, places, D]
    return _joined(y, dilation, rows, columns)[:, :height, :width]


def _tiled(x: Map, cut: Callable[..., Any], dilation: int, rows: Tiles, columns: Tiles) -> Tiled:
    """Sub-grids of places `dilation` apart, and what `cut` makes of their rows and columns."""
    batch, height, width, heads, dims = x.shape
    below, right = -height % dilation, -width % dilation
    x = jnp.pad(x, ((0, 0), (0, below), (0, right), (0, 0), (0, 0))) if below or right else x
    x = x.reshape(batch, rows.length, dilation, columns.length, dilation, heads, dims)
    x = cut(cut(x, rows, 1), columns, 4)  # [B, n, T, d, m, S, d, H, D]
    x = jnp.transpose(x, (0, 3, 6, 1, 4, 7, 2, 5, 8))  # [B, d, d, n, m, H, T, S, D]
    return x.reshape(batch, dilation**2, len(rows.starts) * len(columns.starts), heads, -1, dims)


def _joined(y: Tiled, dilation: int, rows: Tiles, columns: Tiles) -> Map:
    """Lays tiles of queries out as a map again."""
    batch, _, _, heads, _, dims = y.shape
    n, m = len(rows.starts), len(columns.starts)
    y = y.reshape(batch, dilation, dilation, n, m, heads, rows.tile, columns.tile, dims)
    y = jnp.transpose(y, (0, 3, 6, 1, 4, 7, 2, 5, 8))  # [B, n, T, d, m, S, d, H, D]
    y = y.reshape(batch, n * rows.tile, dilation, m * columns.tile, dilation, heads, dims)
    y = y[:, : rows.length, :, : columns.length]  # [B, L, d, M, d, H, D]
    return y.reshape(batch, rows.length * dilation, columns.length * dilation, heads, dims)


def _queries(x: Float[Array, "..."], cut: Tiles, axis: int) -> Float[Array, "..."]:
    """Cuts an axis into tiles side by side; the last one may be filled up with zeros."""
    missing = len(cut.starts) * cut.tile - cut.length
    x = jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x
    return x.reshape(*x.shape[:axis], len(cut.starts), cut.tile, *x.shape[axis + 1 :])


def _keys(x: Float[Array, "..."], cut: Tiles, axis: int) -> Float[Array, "..."]:
    """Cuts an axis into what tiles see, which overlaps."""
    slices = [jax.lax.slice_in_dim(x, start, start + cut.span, axis=axis) for start in cut.starts]
    return jnp.stack(slices, axis)


def _bias(
    table: Float[Array, "offsets offsets h"] | None, kernel: int, rows: Tiles, columns: Tiles
) -> Float[Array, "grids tiles #h places keys"]:
    """The table at every pair of a query and a key, and what hides those that are no neighbours.

    The table is read by products with zeros and ones: gathers, and scatters in the backward pass, are slow.
    """
    x, y = (cut.allowed.shape[0] for cut in (rows, columns))
    n, m = len(rows.starts), len(columns.starts)
    across = rows.allowed.reshape(x, 1, n, 1, 1, rows.tile, 1, rows.span, 1)
    down = columns.allowed.reshape(1, y, 1, m, 1, 1, columns.tile, 1, columns.span)
    allowed = jnp.asarray(across & down)  # [x, y, n, m, 1, T, S, R, C]
    bias = jnp.zeros(allowed.shape, jnp.float32)
    if table is not None:
        pick_row, pick_column = (
            jnp.asarray(cut.offsets[..., None] + kernel - 1 == np.arange(2 * kernel - 1), jnp.float32)
            for cut in (rows, columns)
        )
        half = jnp.einsum("xnpru,uvh->xnprvh", pick_row, table.astype(jnp.float32))
        bias = jnp.einsum("xnprvh,ymqsv->xynmhpqrs", half, pick_column)
    bias = jnp.where(allowed, bias, jnp.finfo(jnp.float32).min)
    if (x, y) != (1, 1):
        side = max(x, y)
        bias = jnp.broadcast_to(bias, (side, side, *bias.shape[2:]))
    return bias.reshape(-1, n * m, bias.shape[4], rows.tile * columns.tile, rows.span * columns.span)


class Neighborhood(nn.Module):
    """Neighbourhood attention on a grid.

    Attributes:
      heads: attention heads.
      kernel: side of the neighbourhood, odd.
      dilation: distance of neighbours.
      qkv_bias: biases of the query, key and value projections.
      implementation: `plain` is what stands here, on every platform; for the others see
        `effjax.mixers.neighbor_kernel`.
    """

    heads: int
    kernel: int = 7
    dilation: int = 1
    qkv_bias: bool = True
    implementation: Implementation = "plain"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b height width c"], context: Context, train: bool = False
    ) -> Float[Array, "b height width c"]:
        """Mixes every place with its neighbours.

        Raises:
          UsageError: where the heads do not divide the channels.
        """
        (height, width), channels = x.shape[1:3], x.shape[-1]
        if channels % self.heads:
            raise UsageError(f"heads={self.heads} does not divide the width {channels}.")
        least = self.kernel * self.dilation
        below, right = max(0, least - height), max(0, least - width)
        if below or right:
            x = jnp.pad(x, ((0, 0), (0, below), (0, right), (0, 0)))  # [B, H', W', C]
        head, axes = (self.heads, channels // self.heads), ("embed", "heads", "head_dim")
        q, k, v = (
            Dense(head, axes, use_bias=self.qkv_bias, name=name)(x) for name in ("query", "key", "value")
        )  # [B, H', W', heads, D]
        side = 2 * self.kernel - 1
        init = named(truncated_normal(0.02), (None, None, "heads"))
        table = jnp.asarray(self.param("bias", init, (side, side, self.heads), jnp.float32))
        if self.implementation == "plain":
            y = neighborhood_attention(q, k, v, kernel=self.kernel, dilation=self.dilation, table=table)
        else:
            y = by_kernel(
                *(q, k, v, table),
                window=(self.kernel, self.kernel),
                dilation=self.dilation,
                scale=head[1] ** -0.5,
                implementation=self.implementation,
            )  # [B, H', W', heads, D]
        y = y[:, :height, :width]
        return Dense(channels, ("heads", "head_dim", "embed"), inputs=2, name="output")(y)  # [B, H, W, C]
