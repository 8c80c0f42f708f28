"""Tables and kernels made for one picture or window, resized for another.

Three things in a vision network depend on its input's size: the table of positions, the table of relative
position biases, and the patch kernel. Each function here works on one array in the layout of the other
library, computes in float32 (float64 where a system is solved) and returns the dtype it was given. Each
class wraps one for a row of a name map.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Shaped

Shape = tuple[int, ...]
Grid = tuple[int, int]
Change = Callable[[np.ndarray], np.ndarray]

# Keys' cubic: -0.5 is the exact third-order one, used with antialiasing; -0.75 is what torch uses without.
_CUBIC, _CUBIC_TORCH = -0.5, -0.75


@dataclasses.dataclass(frozen=True)
class Request:
    """What a resizer may know about both sides.

    Attributes:
      picture: height and width of the pictures our model is built for; None for models of other inputs.
      source_grid: grid that the tables in the weights stand on, where somebody said; None means square.
    """

    picture: Grid | None = None
    source_grid: Grid | None = None


@dataclasses.dataclass(frozen=True)
class Positions:
    """Resizes `[1, prefix + h w, channels]` or `[prefix + h w, channels]`.

    Attributes:
      patch: pixels of a token's side, which with the picture says the new grid.
      prefix: tokens in front that stand at no place: class, distillation, registers. They stay as they are.
    """

    patch: int
    prefix: int = 0

    def prepare(self, found: Shape, shape: Shape, request: Request) -> Change | str:
        """Returns what resizes the table, or why that cannot be."""
        if len(found) != len(shape) or found[:-2] != shape[:-2] or found[-1] != shape[-1]:
            return "a position table is resized in its tokens alone"
        new = request.picture and (request.picture[0] // self.patch, request.picture[1] // self.patch)
        new = new or _square(shape[-2] - self.prefix)
        old = request.source_grid or _square(found[-2] - self.prefix)
        if old is None or math.prod(old) != found[-2] - self.prefix:
            return f"its {found[-2] - self.prefix} places are on no square: give source_grid=(rows, columns)"
        if new is None or math.prod(new) != shape[-2] - self.prefix:
            return f"our {shape[-2] - self.prefix} places are not the grid of the pictures"
        return lambda table: resize_positions(table, old, new, self.prefix)


@dataclasses.dataclass(frozen=True)
class RelativeBias:
    """Resizes `[(2 h - 1) (2 w - 1) + extra, heads]` between windows.

    Attributes:
      window: of our model, `(h, w)`.
      source_window: of the weights; None means square.
    """

    window: Grid
    source_window: Grid | None = None

    def prepare(self, found: Shape, shape: Shape, request: Request) -> Change | str:
        """Returns what resizes the table, or why that cannot be."""
        if len(found) != 2 or found[1] != shape[1]:
            return "a relative position bias table is resized in its places alone"
        new = (2 * self.window[0] - 1, 2 * self.window[1] - 1)
        extra = shape[0] - math.prod(new)
        old = _square(found[0] - extra)
        if self.source_window is not None:
            old = (2 * self.source_window[0] - 1, 2 * self.source_window[1] - 1)
        if old is None or math.prod(old) != found[0] - extra or not (old[0] % 2 and old[1] % 2):
            return f"its {found[0] - extra} places are those of no square window"
        return lambda table: resize_relative_bias(table, old, new)


@dataclasses.dataclass(frozen=True)
class Patches:
    """Resizes a patch kernel `[out, in, h, w]`."""

    def prepare(self, found: Shape, shape: Shape, request: Request) -> Change | str:
        """Returns what resizes the kernel, or why that cannot be."""
        if len(found) != 4 or len(shape) != 4 or found[:2] != shape[:2] or 0 in found:
            return "a patch kernel is resized in its height and width alone"
        if max(found[2:]) > 64:
            return "a patch of more than 64 pixels is not resized"
        return lambda kernel: resize_patches(kernel, (shape[2], shape[3]))


def resize_positions(
    table: Shaped[np.ndarray, "*one n c"], old: Grid, new: Grid, prefix: int = 0
) -> Shaped[np.ndarray, "*one m c"]:
    """Resamples a position table from one grid to another, bicubic with antialiasing.

    The first `prefix` rows are kept; the rest stands row by row on `old` and is interpolated to `new`. The
    same as timm's `resample_abs_pos_embed`.
    """
    kept, places = table[..., :prefix, :], table[..., prefix:, :]
    if old == new:
        return table
    grid = places.astype(np.float32).reshape(old[0], old[1], -1)  # [H, W, C]
    grid = np.einsum("ih,hwc->iwc", cubic_matrix(old[0], new[0]), grid)
    grid = np.einsum("jw,iwc->ijc", cubic_matrix(old[1], new[1]), grid)  # [H', W', C]
    places = grid.reshape(*places.shape[:-2], new[0] * new[1], -1).astype(table.dtype)
    return np.concatenate([kept, places], axis=-2)


def resize_patches(
    kernel: Shaped[np.ndarray, "out in h w"], new: Grid
) -> Shaped[np.ndarray, "out in new_h new_w"]:
    """Resizes a patch kernel so that it gives the same tokens on pictures that were resized alike.

    With `B` the matrix that resizes a patch of the old size to the new one (bicubic, antialiased), the new
    kernel is the least-squares solution of `<B x, w'> = <x, w>` for all x: `w' = pinv(B^T) w`. For patches
    that grow it is exact.

    Source: Beyer et al., "FlexiViT: One Model for All Patch Sizes", CVPR 2023, section 3.4.
    """
    old = kernel.shape[2:]
    if old == new:
        return kernel
    resize = np.kron(cubic_matrix(old[0], new[0]), cubic_matrix(old[1], new[1]))  # [new, old]
    solve = np.linalg.pinv(resize.astype(np.float64))  # [old, new]
    flat = kernel.reshape(*kernel.shape[:2], -1).astype(np.float32) @ solve.astype(np.float32)
    return flat.reshape(*kernel.shape[:2], *new).astype(kernel.dtype)


def resize_relative_bias(
    table: Shaped[np.ndarray, "n heads"], old: Grid, new: Grid
) -> Shaped[np.ndarray, "m heads"]:
    """Resamples a table of relative position biases, dense near the centre and coarse far from it.

    The old entries are placed at distances 0, 1, 1 + q, 1 + q + q^2, ... from the centre, with `q` such that
    they span the new table, and read off at whole distances by bilinear interpolation. Near offsets, which
    mean the same in every window, thereby keep their values. Rows after the old grid are kept.

    Args:
      table: `old[0] old[1]` rows, the offsets row by row, and any further rows.
      old: offsets of the old window, `(2 h - 1, 2 w - 1)`.
      new: offsets of the new one.

    Source: the fine-tuning code of BEiT (Bao et al. 2022), as timm's `resize_rel_pos_bias_table` does it.
    """
    if old == new:
        return table
    places, kept = table[: math.prod(old)], table[math.prod(old) :]
    grid = places.astype(np.float32).reshape(old[0], old[1], -1)  # [H, W, heads]
    for axis in (0, 1):
        at = _spread(old[axis], new[axis])
        half = new[axis] // 2
        grid = _interpolate(grid, axis, at, np.arange(-half, half + 1, dtype=np.float64))
    return np.concatenate([grid.reshape(math.prod(new), -1).astype(table.dtype), kept])


def cubic_matrix(old: int, new: int, antialias: bool = True) -> Float[np.ndarray, "new old"]:
    """The matrix of bicubic interpolation along one axis, half-pixel centres.

    With antialiasing the cubic is widened by the scale where the axis shrinks, cut at the border and
    normalised; without, the border is repeated. Both are what torch's `interpolate` does.
    """
    scale = old / new
    centre = (np.arange(new, dtype=np.float64) + 0.5) * scale - 0.5  # in pixels of the old axis
    if antialias:
        distance = (np.arange(old)[None] - centre[:, None]) / max(scale, 1.0)
        weights = _cubic(distance, _CUBIC)
        return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    matrix = np.zeros((new, old))
    first = np.floor(centre).astype(int)
    for tap in range(-1, 3):
        column = np.clip(first + tap, 0, old - 1)
        np.add.at(matrix, (np.arange(new), column), _cubic(first + tap - centre, _CUBIC_TORCH))
    return matrix.astype(np.float32)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _spread(old: int, new: int) -> np.ndarray:
    """Places of `old` offsets at distances that grow geometrically, to span `new` offsets."""
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio ** (old // 2)) / (1 - ratio) > new // 2:
            high = ratio
        else:
            low = ratio
    distance = np.cumsum(ratio ** np.arange(old // 2))
    return np.concatenate([-distance[::-1], [0.0], distance])


def _interpolate(grid: np.ndarray, axis: int, at: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Linear interpolation along one axis between values that stand `at` increasing places.

    Beyond the last place the last value holds.
    """
    right = np.clip(np.searchsorted(at, wanted), 1, len(at) - 1)
    share = np.clip((wanted - at[right - 1]) / (at[right] - at[right - 1]), 0.0, 1.0)
    share = share.astype(np.float32).reshape((-1,) + (1,) * (grid.ndim - 1 - axis))
    return np.take(grid, right - 1, axis) * (1 - share) + np.take(grid, right, axis) * share


def _square(count: int) -> Grid | None:
    side = math.isqrt(max(count, 0))
    return (side, side) if side * side == count and side else None
