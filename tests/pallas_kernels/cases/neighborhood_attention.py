"""Windows as long as the map, uneven sub-grids, causal axes, one to three axes, shifted windows, stripes."""

import hypothesis.strategies as st
import numpy as np

from pallas_kernels.neighborhood_attention import neighborhood_attention
from tests.pallas_kernels.cases import Case


def numbers(sides, heads, size, windows, magnitude=1.0, batch=1, nearest=True):
    """Queries, keys and values of a map, and a bias."""
    draw = np.random.default_rng(0)
    places = int(np.prod(windows))
    bias = (*(2 * window - 1 for window in windows), heads) if nearest else (heads, places, places)
    shapes = [(batch, *sides, heads, size)] * 3
    maps = (magnitude * draw.normal(size=shape) for shape in shapes)
    return tuple(array.astype(np.float32) for array in (*maps, draw.normal(size=bias)))


@st.composite
def arguments(draw):
    axes = draw(st.sampled_from([1, 2]))
    windows = [draw(st.sampled_from([1, 2, 3, 5])) for _ in range(axes)]
    dilations = [draw(st.sampled_from([1, 2, 3])) for _ in range(axes)]
    sides = [
        window * dilation + draw(st.sampled_from([0, 1, 7]))
        for window, dilation in zip(windows, dilations, strict=True)
    ]
    heads, size = draw(st.sampled_from([(1, 8), (3, 8), (4, 64)]))
    arrays = numbers(sides, heads, size, windows, draw(st.sampled_from([1e-3, 1.0, 10.0])))
    causal = tuple(draw(st.booleans()) for _ in range(axes))
    return arrays, dict(window=tuple(windows), dilation=tuple(dilations), causal=causal)


def windows(sides, window, shift, heads=2, size=8):
    return numbers(sides, heads, size, window, nearest=False), dict(window=window, shift=shift)


CASE = Case(
    function=neighborhood_attention,
    arguments=arguments(),
    dtypes=dict(tpu=("float32", "bfloat16")),
    differentiated=4,
    fixed=dict(
        one_place=lambda: (numbers((1,), 1, 8, (1,)), dict(window=1)),
        whole_map=lambda: (numbers((5, 9), 2, 8, (5, 9)), dict(window=(5, 9))),
        many_tiles=lambda: (numbers((19, 21), 2, 8, (3, 7), batch=2), dict(window=(3, 7))),
        uneven_grids=lambda: (numbers((9, 17), 2, 8, (3, 3)), dict(window=3, dilation=(2, 5))),
        volume=lambda: (
            numbers((3, 4, 9), 2, 8, (2, 3, 3)),
            dict(window=(2, 3, 3), causal=(True, False, False)),
        ),
        many_heads=lambda: (numbers((6, 9), 24, 24, (3, 3)), dict(window=3)),
        shifted=lambda: windows((6, 9), (3, 3), (1, 2)),
        stripes=lambda: windows((9, 4), (9, 1), 0, heads=1),
        shifted_volume=lambda: windows((2, 4, 6), (2, 2, 3), (0, 1, 1)),
    ),
)
