"""Few blocks and all, columns without any, groups that are full and not, several tiles of rows."""

import itertools

import hypothesis.strategies as st
import numpy as np

from pallas_kernels.block_sparse_matmul import block_sparse_matmul
from tests.pallas_kernels.cases import Case


def numbers(rows, high, wide, blocks, magnitude=1.0, block=(128, 128), columns=None):
    """x, so many blocks of `high` by `wide`, in any place or in the columns given, and where they are."""
    draw = np.random.default_rng(blocks)
    places = np.arange(high * wide)
    if columns is not None:
        places = places[np.isin(places // high, columns)]
    column, row = np.divmod(np.sort(draw.permutation(places)[:blocks]), high)
    starts = np.searchsorted(column, np.arange(wide + 1))
    x = magnitude * draw.normal(size=(rows, high * block[0]))
    values = draw.normal(size=(blocks, *block))
    return x.astype(np.float32), values.astype(np.float32), row.astype(np.int32), starts.astype(np.int32)


def whole(values, inputs, starts, high):
    """The matrix, block by block."""
    _, k, n = values.shape
    matrix = np.zeros((high * k, (len(starts) - 1) * n), values.dtype)
    for column, (begin, end) in enumerate(itertools.pairwise(starts)):
        for b in range(begin, end):
            matrix[inputs[b] * k : (inputs[b] + 1) * k, column * n : (column + 1) * n] = values[b]
    return matrix


@st.composite
def arguments(draw):
    high, wide = draw(st.sampled_from([(1, 1), (3, 2), (2, 5), (6, 6)]))
    blocks = draw(st.sampled_from([1, -(-high * wide // 3), high * wide]))
    rows, magnitude = draw(st.sampled_from([1, 5, 33])), draw(st.sampled_from([1e-3, 1.0, 30.0]))
    return numbers(rows, high, wide, blocks, magnitude), {}


CASE = Case(
    function=block_sparse_matmul,
    arguments=arguments(),
    dtypes=dict(tpu=("float32", "bfloat16")),
    # Of x and of the blocks: by the specification, as nobody trains them so.
    differentiated=2,
    fixed=dict(
        one_block=lambda: (numbers(2, 3, 4, 1), {}),
        empty_columns=lambda: (numbers(3, 4, 6, 6, columns=(1, 4)), {}),
        one_more_than_a_group=lambda: (numbers(2, 9, 8, 65), {}),
        several_tiles=lambda: (numbers(150, 2, 2, 3), {}),
        larger_blocks=lambda: (numbers(2, 2, 3, 4, block=(256, 128)), {}),
    ),
)
