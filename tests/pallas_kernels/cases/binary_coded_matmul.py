"""One row and many, one plane and four, groups of less than a product, columns that no block divides."""

import hypothesis.strategies as st
import numpy as np

from pallas_kernels.binary_coded_matmul import binary_coded_matmul
from tests.pallas_kernels.cases import Case


def numbers(rows, inputs, columns, planes, group, magnitude=1.0):
    """x, scales, offsets and drawn signs."""
    draw = np.random.default_rng(0)
    groups = inputs // group
    x = magnitude * draw.normal(size=(rows, inputs))
    alpha = draw.uniform(0.01, 0.1, (planes, groups, columns))
    offset = 0.05 * draw.normal(size=(groups, columns))
    signs = draw.integers(0, 256, (planes, inputs // 8, columns)).astype(np.uint8)
    return *(array.astype(np.float32) for array in (x, alpha, offset)), signs


@st.composite
def arguments(draw):
    rows, planes = draw(st.sampled_from([1, 5, 17])), draw(st.sampled_from([1, 2, 3]))
    inputs, group = draw(st.sampled_from([(512, 128), (512, 256), (1024, 1024)]))
    columns = draw(st.sampled_from([64, 128, 200]))
    magnitude = draw(st.sampled_from([1e-3, 1.0, 30.0]))
    return numbers(rows, inputs, columns, planes, group, magnitude), {}


CASE = Case(
    function=binary_coded_matmul,
    arguments=arguments(),
    dtypes=dict(tpu=("float32", "bfloat16", "float16"), gpu=("bfloat16", "float16")),
    differentiated=1,
    fixed=dict(
        four_planes=lambda: (numbers(2, 512, 136, 4, 128), {}),
        many_rows=lambda: (numbers(150, 512, 64, 1, 256), {}),
        many_steps=lambda: (numbers(4, 3072, 128, 2, 512), {}),
    ),
)
