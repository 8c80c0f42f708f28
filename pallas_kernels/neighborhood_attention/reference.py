"""Attention to neighbours in plain JAX: the specification, and what runs where there is no kernel.

Gathering the keys of every query would copy them once a neighbour. Here queries stand in tiles, each with all
keys that any of them sees, and a mask: all is batched matrix products.
"""

import math

import jax
import jax.numpy as jnp

from pallas_kernels.neighborhood_attention.axes import Axis, Cut, cut, on_tile, outer


def neighborhood_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None = None,
    *,
    axes: tuple[Axis, ...],
    scale: float,
) -> jax.Array:
    """softmax(scale q k^T + bias) v over the keys that a query sees; logits in float32.

    Args:
      q: `[B, *map, H, D]`.
      k: `[B, *map, H, D]`.
      v: `[B, *map, H, D]`.
      bias: `[2 window - 1, ..., H]` by the way from a query to a key along each axis; of windows `[H, P, P]`
        by query and key among the P places of a window.
      axes: of the map.
      scale: of the products.

    Returns:
      `[B, *map, H, D]`.
    """
    cuts = tuple(cut(axis, tile_of(axis)) for axis in axes)
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    q, k, v = _tiled(q, cuts, False), _tiled(k, cuts, True), _tiled(v, cuts, True)  # [B, tiles, H, places, D]
    logits = jnp.einsum(
        "bthqd,bthkd->bthqk", q, k, precision=precision, preferred_element_type=jnp.float32
    )  # [B, tiles, H, queries, keys]
    logits = logits * scale
    if bias is not None:
        logits = logits + on_tile(bias, cuts)[None, None]
    seen = outer([one.kinds[one.kind.reshape(-1)] for one in cuts])  # [tiles, queries, keys]
    if not seen.all():
        logits = jnp.where(jnp.asarray(seen)[None, :, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)  # [B, tiles, H, queries, keys]
    y = jnp.einsum("bthqk,bthkd->bthqd", weights, v, precision=precision)
    return _joined(y, cuts)  # [B, *map, H, D]


def tile_of(axis: Axis) -> int:
    """Queries of a tile: about a window, or a short group as a whole."""
    if axis.shift is not None:
        return axis.window
    length = -(-axis.length // axis.dilation)
    count = 1 if length <= 2 * axis.window else round(length / axis.window)
    return -(-length // count)


def pairs(axes: tuple[Axis, ...]) -> int:
    """Queries times keys of all tiles of a map."""
    cuts = [cut(axis, tile_of(axis)) for axis in axes]
    return math.prod(one.count * one.tile * one.region for one in cuts)


def _tiled(x: jax.Array, cuts: tuple[Cut, ...], keys: bool) -> jax.Array:
    """`[B, *map, H, D]` as tiles, or as their regions, `[B, tiles of the map, H, places, D]`."""
    axis = 1
    for one in cuts:
        x = _along(x, one, keys, axis)  # [..., groups, tiles, places, ...]
        axis += 3
    count = len(cuts)
    numbers = [1 + 3 * i + j for j in (0, 1) for i in range(count)]
    numbers.sort()
    heads = 1 + 3 * count
    places = [3 + 3 * i for i in range(count)]
    x = x.transpose(0, *numbers, heads, *places, heads + 1)
    tiles = math.prod(one.count for one in cuts)
    return x.reshape(x.shape[0], tiles, x.shape[2 * count + 1], -1, x.shape[-1])


def _along(x: jax.Array, one: Cut, keys: bool, axis: int) -> jax.Array:
    """An axis as groups, tiles and places."""
    kind = one.axis
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    if kind.shift is not None:
        x = jnp.roll(x, -kind.shift, axis) if kind.shift else x
        return x.reshape(*before, kind.groups, 1, kind.window, *after)
    length = -(-kind.length // kind.dilation)
    x = _pad(x, axis, 0, length * kind.dilation - kind.length)
    x = jnp.moveaxis(x.reshape(*before, length, kind.dilation, *after), axis + 1, axis)
    if not keys:
        x = _pad(x, axis + 1, one.before, one.queries - one.before - length)
        return x.reshape(*before, kind.dilation, one.tiles, one.tile, *after)
    front = one.before + one.reach
    x = _pad(x, axis + 1, front, one.keys - front - length)
    regions = [
        jax.lax.slice_in_dim(x, t * one.tile, t * one.tile + one.region, axis=axis + 1)
        for t in range(one.tiles)
    ]
    return jnp.stack(regions, axis + 1)


def _pad(x: jax.Array, axis: int, before: int, after: int) -> jax.Array:
    if not before and not after:
        return x
    return jnp.pad(x, [(before, after) if i == axis else (0, 0) for i in range(x.ndim)])


def _joined(y: jax.Array, cuts: tuple[Cut, ...]) -> jax.Array:
    """Lays tiles out as a map again."""
    count, batch, heads, dims = len(cuts), y.shape[0], y.shape[2], y.shape[-1]
    numbers = [side for one in cuts for side in (one.axis.groups, one.tiles)]
    y = y.reshape(batch, *numbers, heads, *(one.tile for one in cuts), dims)
    order = [part for i in range(count) for part in (1 + 2 * i, 2 + 2 * i, 2 + 2 * count + i)]
    y = y.transpose(0, *order, 1 + 2 * count, y.ndim - 1)  # [B, groups, tiles, tile, ..., H, D]
    for i, one in enumerate(cuts):
        axis = 1 + i
        before, after = y.shape[:axis], y.shape[axis + 3 :]
        if one.axis.shift is not None:
            y = y.reshape(*before, one.axis.length, *after)
            y = jnp.roll(y, one.axis.shift, axis) if one.axis.shift else y
            continue
        length = -(-one.axis.length // one.axis.dilation)
        y = y.reshape(*before, one.axis.dilation, one.queries, *after)
        y = jax.lax.slice_in_dim(y, one.before, one.before + length, axis=axis + 1)
        y = jnp.moveaxis(y, axis, axis + 1).reshape(*before, length * one.axis.dilation, *after)
        y = jax.lax.slice_in_dim(y, 0, one.axis.length, axis=axis)
    return y
