"""Windows on a map: cutting, padding, shifting, and attention inside each.

partition   [B, H, W, ...] -> [B, H/m W/n, m n, ...]
attention   y_q = sum_k p_qk v_k,  p_q = softmax(scale q k^T + bias_qk where k is allowed)
"""

from typing import TypeVar

import einops
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from effjax.mixers.dot_product import dot_products, softmax, weighted_sum

Window = tuple[int, int]
AnyArray = TypeVar("AnyArray", Array, np.ndarray)


def partition(x: AnyArray, window: Window) -> AnyArray:
    """Cuts `[B, H, W, ...]` into windows `[B, windows, places, ...]`, row by row; they must tile the map."""
    m, n = window
    return einops.rearrange(x, "b (h m) (w n) ... -> b (h w) (m n) ...", m=m, n=n)


def reverse(x: Float[Array, "b windows places *rest"], grid: Window, window: Window) -> Array:
    """Lays windows out as the map of `grid` places that they were cut from."""
    m, n = window
    return einops.rearrange(
        x, "b (h w) (m n) ... -> b (h m) (w n) ...", h=grid[0] // m, w=grid[1] // n, m=m, n=n
    )


def sides(window: int | Window) -> Window:
    """Height and width of a window that may be given by its side."""
    return (window, window) if isinstance(window, int) else window


def fitted(window: int | Window, grid: Window) -> Window:
    """The window on a map: not longer than its sides."""
    height, width = sides(window)
    return min(height, grid[0]), min(width, grid[1])


def tiled(x: Float[Array, "b h w c"], window: Window) -> Float[Array, "b h2 w2 c"]:
    """Adds zeros below and to the right, up to where windows tile the map."""
    below, right = -x.shape[1] % window[0], -x.shape[2] % window[1]
    return jnp.pad(x, ((0, 0), (0, below), (0, right), (0, 0))) if below or right else x


def rolled(x: Float[Array, "b h w c"], shift: Window) -> Float[Array, "b h w c"]:
    """Moves the map down and to the right; what leaves it comes in on the other side."""
    return jnp.roll(x, shift, (1, 2)) if any(shift) else x


def shift_of(window: Window, grid: Window, shifted: bool) -> Window:
    """How far a shifted map moves: half a window, and nothing along a side that one window covers."""
    return (half(window[0], grid[0]), half(window[1], grid[1])) if shifted else (0, 0)


def half(side: int, length: int) -> int:
    """Half a window, along a side of the map that one window does not cover."""
    return side // 2 if length > side else 0


def bands(length: int, side: int, shift: int) -> Int[np.ndarray, " length"]:
    """Labels the places along one side of a map rolled by `shift`; neighbours in a window share theirs.

    Three bands: windows that the shift left whole, and the two halves of the last one.
    """
    return np.digitize(np.arange(length), [length - side, length - shift]) if shift else np.zeros(length, int)


def allowed_after_shift(
    grid: Window, window: Window, shift: Window
) -> Bool[np.ndarray, "windows places places"] | None:
    """Which places of a window on a cyclically shifted map were neighbours before; None where all were."""
    if shift == (0, 0):
        return None
    region = np.zeros((1, *grid), np.int32)
    for axis, (n, m, s) in enumerate(zip(grid, window, shift, strict=True), start=1):
        region = region * 3 + bands(n, m, s).reshape([-1 if i == axis else 1 for i in range(3)])
    labels = partition(region, window)[0]  # [windows, places]
    return labels[:, :, None] == labels[:, None, :]


def offsets(window: Window) -> Int[np.ndarray, "places places 2"]:
    """Rows and columns from each key (second axis) to each query (first axis) of a window."""
    places = np.stack(np.meshgrid(*map(np.arange, window), indexing="ij"), axis=-1).reshape(-1, 2)
    return places[:, None] - places[None, :]


def window_attention(
    q: Float[Array, "b windows places h d"],
    k: Float[Array, "b windows places h d"],
    v: Float[Array, "b windows places h d"],
    *,
    scale: float | Float[Array, " h"],
    bias: Float[Array, "h places places"] | None = None,
    allowed: Bool[np.ndarray, "windows places places"] | None = None,
) -> Float[Array, "b windows places h d"]:
    """Softmax attention inside each window; logits in float32.

    Args:
      q: queries.
      k: keys.
      v: values.
      scale: factor of the logits; one a head is applied in float32.
      bias: added to the logits of every window.
      allowed: which keys (last axis) a query sees.
    """
    b, count, places, heads, d = q.shape
    if isinstance(scale, float):
        q = q * scale
    q, k, v = (part.reshape(-1, places, heads, d) for part in (q, k, v))  # [B windows, places, H, D]
    logits = dot_products(q, k)  # [B windows, H, places, places]
    if not isinstance(scale, float):
        logits = logits * scale.astype(jnp.float32)[None, :, None, None]
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)[None]
    if allowed is not None:
        split = logits.reshape(b, count, heads, places, places)
        split = jnp.where(allowed[None, :, None], split, jnp.finfo(jnp.float32).min)
        logits = split.reshape(logits.shape)
    y = weighted_sum(softmax(logits).astype(v.dtype), v)  # [B windows, places, H, D]
    return y.reshape(b, count, places, heads, d)
