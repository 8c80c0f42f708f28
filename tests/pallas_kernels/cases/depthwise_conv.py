"""Odd sides, one place, kernels larger than the map, channels that no block divides, eight maps at once."""

import hypothesis.strategies as st
import numpy as np

from pallas_kernels.depthwise_conv import depthwise_conv
from tests.pallas_kernels.cases import Case


def numbers(batch, height, width, channels, high, wide, magnitude=1.0):
    draw = np.random.default_rng(0)
    shapes = [(batch, height, width, channels), (high, wide, channels), (channels,)]
    return tuple((magnitude * draw.normal(size=shape)).astype(np.float32) for shape in shapes)


@st.composite
def arguments(draw):
    height, width, channels = (draw(st.sampled_from(some)) for some in ([1, 5, 9], [1, 8, 13], [1, 5, 130]))
    high, wide = draw(st.sampled_from([(1, 1), (3, 3), (4, 2), (1, 9)]))
    magnitude = draw(st.sampled_from([1e-3, 1.0, 30.0]))
    arrays = numbers(draw(st.sampled_from([1, 2, 8])), height, width, channels, high, wide, magnitude)
    return arrays, dict(activation=draw(st.sampled_from(["none", "relu", "silu", "gelu"])))


CASE = Case(
    function=depthwise_conv,
    arguments=arguments(),
    dtypes=dict(tpu=("float32", "bfloat16")),
    differentiated=3,
    fixed=dict(
        one_place=lambda: (numbers(1, 1, 1, 3, 5, 5), dict(activation="gelu")),
        larger_than_the_map=lambda: (numbers(1, 4, 3, 3, 31, 2), dict(activation="silu")),
        tiles_over_the_edge=lambda: (numbers(1, 15, 18, 3, 2, 2), {}),
        eight_maps=lambda: (numbers(16, 9, 3, 5, 3, 2), dict(activation="relu")),
        ragged_channels=lambda: (numbers(1, 3, 8, 130, 3, 3), dict(activation="relu")),
    ),
)
