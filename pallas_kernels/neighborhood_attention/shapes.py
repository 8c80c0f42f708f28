"""Shapes that attention to neighbours is measured and compiled at, with the configs they come from."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.shape import Shape, array

BATCH, SIZE = 16, 32


def _shape(name: str, config: str, sides: tuple[int, ...], heads: int, biased: bool, **options: Any) -> Shape:
    window = options["window"]
    windows = window if isinstance(window, tuple) else (window,) * len(sides)

    def arrays(batch: int, heads: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        maps = (array((batch, *sides, heads, SIZE)),) * 3
        if not biased:
            return maps
        if "shift" in options:
            places = windows[0] * windows[1]
            return *maps, array((heads, places, places), jnp.float32)
        return *maps, array((*(2 * side - 1 for side in windows), heads), jnp.float32)

    # A program has as many heads of one map as fill the lanes.
    beside = min(heads, 4)
    parts = BATCH * (heads // beside)
    return Shape(name, config, arrays(BATCH, heads), options, lambda count: arrays(count, beside), parts)


SHAPES = (
    # First and third stages at 224 pixels.
    _shape("nat_1", "configs/vision/dinat.py:nat-tiny", (56, 56), 2, True, window=7),
    _shape("nat_3", "configs/vision/dinat.py:nat-tiny", (14, 14), 8, True, window=7),
    _shape("dinat_1", "configs/vision/dinat.py:tiny", (56, 56), 2, True, window=7, dilation=8),
    _shape("dinat_3", "configs/vision/dinat.py:tiny", (14, 14), 8, True, window=7, dilation=2),
    _shape("swin_1", "configs/vision/swin.py:tiny", (56, 56), 3, True, window=7, shift=3),
    _shape("swin_3", "configs/vision/swin.py:tiny", (14, 14), 12, True, window=7, shift=3),
    # Half of the heads: columns of one place in the first stage, and rows of seven in the third.
    _shape("cswin_1", "configs/vision/cswin.py:tiny", (56, 56), 1, False, window=(56, 1), shift=0),
    _shape("cswin_3", "configs/vision/cswin.py:tiny", (14, 14), 4, False, window=(7, 14), shift=0),
)
