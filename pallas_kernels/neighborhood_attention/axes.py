"""Which keys a query sees along one axis of a map, and how the axis is cut into tiles of queries.

Along each axis places fall into groups that do not see each other, and in its group a query sees the keys
from `first` to before `end`. What it sees of a map is what it sees along every axis.

    nearest    groups are the places `dilation` apart; in a group of n a query i sees the keys from
               clip(i - window // 2, 0, n - window) on, `window` of them
    causal     the same groups; the keys from max(0, i - window + 1) to i
    windows    groups are windows side by side on the map that was rolled by `shift`; all of a window, but for
               the one that has both ends of the map: there places of one end do not see the other

A group is cut into tiles of queries, and each has a region of keys. Both lie in frames: a frame has the
places of all groups one after the other, with room between, so that the region of every tile begins at the
same distance from its queries. What a tile adds to its logits is therefore the same for all tiles, and of
masks there are few kinds.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# The logit of a key that a query does not see; sums of several are numbers still.
NEVER = -1e30


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of a map.

    Attributes:
      length: places.
      window: keys that a query sees.
      dilation: distance of neighbours.
      causal: whether a query sees no later key.
      shift: of windows; None where a query sees its nearest keys.
    """

    length: int
    window: int
    dilation: int = 1
    causal: bool = False
    shift: int | None = None

    @property
    def groups(self) -> int:
        """How many groups there are."""
        return self.dilation if self.shift is None else self.length // self.window

    def places(self, group: int) -> list[tuple[int, int, int]]:
        """Where a group comes from: pieces of first place, count and stride."""
        if self.shift is None:
            return [(group, len(range(group, self.length, self.dilation)), self.dilation)]
        start = group * self.window + self.shift
        before = min(self.window, max(0, self.length - start))
        pieces = [(start, before, 1), (max(0, start - self.length), self.window - before, 1)]
        return [piece for piece in pieces if piece[1]]

    def seen(self, group: int) -> tuple[np.ndarray, np.ndarray]:
        """The first key of every query of a group, and the one behind the last."""
        count = sum(piece[1] for piece in self.places(group))
        query = np.arange(count)
        if self.shift is not None:
            edge = self.window - self.shift if group == self.groups - 1 else self.window
            return np.where(query < edge, 0, edge), np.where(query < edge, edge, self.window)
        if self.causal:
            return np.maximum(query - self.window + 1, 0), query + 1
        first = np.clip(query - self.window // 2, 0, count - self.window)
        return first, first + self.window


@dataclasses.dataclass(frozen=True)
class Cut:
    """An axis in tiles.

    Attributes:
      axis: that is cut.
      tile: queries of a tile.
      tiles: of a group.
      before: places of the first tile in front of the group.
      reach: how far before a tile its region begins.
      region: keys of a tile.
      queries: places of a group in the frame of queries.
      keys: places of a group in the frame of keys.
      kinds: the masks there are, `[kinds, tile, region]`.
      kind: which one each tile has, `[groups, tiles]`.
    """

    axis: Axis
    tile: int
    tiles: int
    before: int
    reach: int
    region: int
    queries: int
    keys: int
    kinds: np.ndarray
    kind: np.ndarray

    @property
    def pieces(self) -> list[tuple[int, int, int, int, int]]:
        """What a frame is filled with: place in that of queries and of keys, first place, count, stride."""
        found = []
        for group in range(self.axis.groups):
            done = self.before
            for start, count, stride in self.axis.places(group):
                found.append(
                    (group * self.queries + done, group * self.keys + self.reach + done, start, count, stride)
                )
                done += count
        return _merged(found)

    @property
    def count(self) -> int:
        """Tiles of all groups."""
        return self.axis.groups * self.tiles

    def start(self, number: Any) -> tuple[Any, Any, Any]:
        """Where a tile begins in the frames of queries and of keys, and its kind of mask."""
        group = lax.div(number, self.tiles) if self.axis.groups > 1 else 0
        kinds = self.kind.reshape(-1)
        kind: Any = int(kinds[0])
        for at in np.flatnonzero(np.diff(kinds)) + 1:
            kind = jnp.where(number >= int(at), int(kinds[at]), kind)
        return number * self.tile, number * self.tile + group * (self.keys - self.queries), kind

    @property
    def offsets(self) -> np.ndarray:
        """From each query of a tile to each key of its region, `[tile, region]`."""
        return np.arange(self.region) - self.reach - np.arange(self.tile)[:, None]


def _merged(pieces: list[tuple[int, int, int, int, int]]) -> list[tuple[int, int, int, int, int]]:
    """Neighbouring pieces as one."""
    found: list[tuple[int, int, int, int, int]] = []
    for piece in pieces:
        if found:
            q, k, start, count, stride = found[-1]
            if stride == 1 == piece[4] and piece[:3] == (q + count, k + count, start + count):
                found[-1] = (q, k, start, count + piece[3], 1)
                continue
        found.append(piece)
    return found


@functools.lru_cache(maxsize=4096)
def fitted(axis: Axis, tile: int, unit: int = 1) -> tuple[int, int, int, int]:
    """Tiles of a group, and `region`, `before` and `reach` of a cut whose regions are shortest."""
    # Groups are of two lengths at most, and in the last window some see less.
    seen = [axis.seen(group) for group in {0, axis.groups - 1}]
    longest = max(len(first) for first, _ in seen)
    tiles = -(-longest // tile)
    best = (2**31, 0, 0)
    for before in range(tiles * tile - longest + 1):
        reach, end = 0, 1
        for first, last in seen:
            start = (np.arange(len(first)) + before) // tile * tile - before
            reach, end = max(reach, int((start - first).max())), max(end, int((last - start).max()))
        best = min(best, (-(-(reach + end) // unit) * unit, before, reach))
    return tiles, *best


@functools.lru_cache(maxsize=256)
def cut(axis: Axis, tile: int, unit: int = 1) -> Cut:
    """Cuts an axis into tiles of so many queries, and begins it where regions are shortest.

    Args:
      axis: to be cut.
      tile: queries; a multiple of `unit`.
      unit: what regions and frames are filled up to.
    """
    tiles, region, before, reach = fitted(axis, tile, unit)
    seen = [axis.seen(group) for group in range(axis.groups)]
    longest = max(len(first) for first, _ in seen)
    keys = max((tiles - 1) * tile + region, -(-(reach + before + longest) // unit) * unit)
    masks = np.stack([_masks(*one, tile, tiles, before, reach, region) for one in seen])
    kinds, kind = np.unique(masks.reshape(-1, tile * region), axis=0, return_inverse=True)
    kinds, kind = kinds.reshape(-1, tile, region), kind.reshape(axis.groups, tiles)
    return Cut(axis, tile, tiles, before, reach, region, tiles * tile, keys, kinds, kind)


def _masks(
    first: np.ndarray, end: np.ndarray, tile: int, tiles: int, before: int, reach: int, region: int
) -> np.ndarray:
    """Which keys of its region each query of a group sees, `[tiles, tile, region]`."""
    filled = np.zeros((2, tiles * tile), int)  # those that are no query see nothing
    filled[0, before : before + len(first)], filled[1, before : before + len(first)] = first, end
    low, high = filled.reshape(2, tiles, tile, 1)
    key = (np.arange(tiles) * tile - before - reach)[:, None, None] + np.arange(region)
    return (key >= low) & (key < high)


def on_tile(bias: jax.Array, cuts: tuple[Cut, ...]) -> jax.Array:
    """What is added to the logits of a tile, `[H, queries, keys]` in float32.

    A table of offsets is read by products with zeros and ones: gathers, and scatters in the backward pass,
    are slow. Of windows the pairs of places are filled up to a tile.
    """
    bias = bias.astype(jnp.float32)
    sides = [cut.tile for cut in cuts], [cut.region for cut in cuts]
    if cuts[0].axis.shift is not None:
        windows = [cut.axis.window for cut in cuts]
        edges = [(0, 0)]
        for wanted in sides:
            edges += [(0, side - window) for side, window in zip(wanted, windows, strict=True)]
        whole = jnp.pad(bias.reshape(bias.shape[0], *windows, *windows), edges)
        return whole.reshape(bias.shape[0], np.prod(sides[0]), np.prod(sides[1]))
    for cut in cuts:  # [offsets, ..., H, tile, region, ...]
        wanted = cut.offsets[..., None] + cut.axis.window - 1 == np.arange(2 * cut.axis.window - 1)
        bias = jnp.tensordot(bias, jnp.asarray(wanted, jnp.float32), ((0,), (2,)), precision="highest")
    count = len(cuts)
    order = (0, *range(1, 2 * count, 2), *range(2, 2 * count + 1, 2))
    return bias.transpose(order).reshape(bias.shape[0], np.prod(sides[0]), np.prod(sides[1]))


def outer(masks: list[Any], module: Any = np) -> Any:
    """Masks of axes `[kinds, tile, region]` as one of the map: `[kinds of all, queries, keys]`."""
    whole = masks[0]
    for mask in masks[1:]:
        whole = whole[:, None, :, None, :, None] & mask[None, :, None, :, None, :]
        a, b, c, d, e, f = whole.shape
        whole = whole.reshape(a * b, c * d, e * f)
    return whole
