"""Windows of a volume, as `effjax.mixers.windows` cuts them of a map: of a video's frames, rows and columns.

    partition   [B, F, H, W, ...] -> [B, windows, places, ...], both counted frame by frame and row by row
    cut         the same of a volume padded to whole windows and rolled by half a window along each side
    allowed     which places of a window are both in the volume, and were neighbours there before the roll

A map is the volume of one frame: with F = 1 everything here is what `windows` does. Places of padding see
each other, so that no softmax is over nothing, and no place of the volume sees them.

    size = volumes.fitted(window, grid)                        # grid = x.shape[1:4]
    shift = volumes.shift_of(size, grid, shifted)
    q, k, v = project(volumes.cut(x, size, shift))             # [B, windows, places, H, D]
    y = windows.window_attention(q, k, v, scale=scale, allowed=volumes.allowed(grid, size, shift))
    x = volumes.laid_out(output(y), grid, size, shift)         # [B, F, H, W, C]

Source: Video Swin Transformer, Liu et al. 2022, section 3.2 for windows that shift along three sides.
"""

from typing import TypeVar

import einops
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from effjax.mixers import windows

Volume = tuple[int, int, int]
AnyArray = TypeVar("AnyArray", Array, np.ndarray)


def partition(x: AnyArray, window: Volume) -> AnyArray:
    """Cuts `[B, F, H, W, ...]` into windows `[B, windows, places, ...]`; they must tile the volume."""
    l, m, n = window
    return einops.rearrange(x, "b (f l) (h m) (w n) ... -> b (f h w) (l m n) ...", l=l, m=m, n=n)


def reverse(x: Float[Array, "b windows places *rest"], grid: Volume, window: Volume) -> Array:
    """Lays windows out as the volume of `grid` places that they were cut from."""
    f, h, w = (length // side for length, side in zip(grid, window, strict=True))
    l, m, n = window
    return einops.rearrange(
        x, "b (f h w) (l m n) ... -> b (f l) (h m) (w n) ...", f=f, h=h, w=w, l=l, m=m, n=n
    )


def fitted(window: Volume, grid: Volume) -> Volume:
    """The window in a volume: not longer than its sides."""
    return min(window[0], grid[0]), min(window[1], grid[1]), min(window[2], grid[2])


def shift_of(window: Volume, grid: Volume, shifted: bool) -> Volume:
    """How far a shifted volume moves: half a window, and nothing along a side that one window covers."""
    if not shifted:
        return 0, 0, 0
    frames, down, right = (windows.half(m, n) for m, n in zip(window, grid, strict=True))
    return frames, down, right


def tiled(grid: Volume, window: Volume) -> Volume:
    """The sides of the volume after padding: the next multiples of the window's."""
    frames, height, width = (n + -n % m for m, n in zip(window, grid, strict=True))
    return frames, height, width


def cut(
    x: Float[Array, "b f h w c"], window: Volume, shift: Volume = (0, 0, 0)
) -> Float[Array, "b windows places c"]:
    """Pads with zeros at the far ends, rolls towards the near ones by `shift`, and partitions."""
    grid = x.shape[1], x.shape[2], x.shape[3]
    whole = tiled(grid, window)
    if whole != grid:
        x = jnp.pad(x, ((0, 0), *((0, m - n) for m, n in zip(whole, grid, strict=True)), (0, 0)))
    if any(shift):
        x = jnp.roll(x, [-s for s in shift], (1, 2, 3))
    return partition(x, window)


def laid_out(
    x: Float[Array, "b windows places c"], grid: Volume, window: Volume, shift: Volume = (0, 0, 0)
) -> Float[Array, "b f h w c"]:
    """The inverse of `cut`: the volume of `grid` places, without its padding."""
    x = reverse(x, tiled(grid, window), window)
    if any(shift):
        x = jnp.roll(x, shift, (1, 2, 3))
    return x[:, : grid[0], : grid[1], : grid[2]]


def allowed(
    grid: Volume, window: Volume, shift: Volume = (0, 0, 0)
) -> Bool[np.ndarray, "windows places places"] | None:
    """Which places (last axis) each place of a window sees after `cut`; None where all see all."""
    seen = regions(grid, window, shift)
    return None if seen is None else seen[:, :, None] == seen[:, None, :]


def regions(
    grid: Volume, window: Volume, shift: Volume = (0, 0, 0)
) -> Int[np.ndarray, "windows places"] | None:
    """Labels the places after `cut`: in a window those with the same label see each other; see `allowed`."""
    whole = tiled(grid, window)
    if not any(shift) and whole == grid:
        return None
    labels = np.zeros((1, 1, 1), int)
    for axis, (n, real, m, s) in enumerate(zip(whole, grid, window, shift, strict=True)):
        inside = np.roll(np.arange(n) < real, -s)
        along = 2 * windows.bands(n, m, s) + inside  # below 6
        labels = labels * 6 + np.expand_dims(along, [other for other in range(3) if other != axis])
    return partition(labels[None], window)[0]
