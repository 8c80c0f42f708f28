"""Blocks of no, one and all levels, places that no block divides, later keys, queries that see nothing."""

import hypothesis.strategies as st
import numpy as np

from pallas_kernels.block_sparse_attention import block_sparse_attention
from tests.pallas_kernels.cases import Case


def numbers(queries, keys, heads=2, groups=1, size=16, values=16, magnitude=1.0, batch=1):
    draw = np.random.default_rng(0)
    shapes = [(batch, queries, heads, size), (batch, keys, groups, size), (batch, keys, groups, values)]
    q, k, v = (draw.normal(size=shape).astype(np.float32) for shape in shapes)
    return np.float32(magnitude) * q, k, v


def drawn(arrays, depth, of_queries, of_keys, seed=0, least=0):
    """Levels of all blocks, any from `least` to the depth."""
    (batch, queries, heads, _), keys = arrays[0].shape, arrays[1].shape[1]
    shape = (batch, heads, -(-queries // of_queries), -(-keys // of_keys))
    return np.random.default_rng(seed).integers(least, depth + 1, shape).astype(np.int32)


def case(queries, keys, depth, of_queries=16, of_keys=16, least=0, causal=False, **sizes):
    arrays = numbers(queries, keys, **sizes)
    levels = drawn(arrays, depth, of_queries, of_keys, least=least)
    return (*arrays, levels), dict(depth=depth, queries=of_queries, keys=of_keys, causal=causal)


@st.composite
def arguments(draw):
    depth, of_keys = draw(st.sampled_from([(1, 16), (2, 16), (3, 32), (4, 128)]))
    queries, keys = (draw(st.sampled_from([1, 40, 150])) for _ in "qk")
    groups, heads = draw(st.sampled_from([(1, 1), (1, 2), (2, 2)]))
    size, values = draw(st.sampled_from([(16, 16), (128, 128), (64, 40)]))
    magnitude = draw(st.sampled_from([1e-3, 1.0, 30.0]))
    sizes = dict(heads=heads, groups=groups, size=size, values=values, magnitude=magnitude)
    return case(queries, keys, depth, 32, of_keys, causal=draw(st.booleans()), **sizes)


def many_tiles():
    """More blocks than a tile has, at both levels; the last block has 5 keys."""
    return case(20, 16 * 70 + 5, 2, least=1, heads=1)


def nothing():
    """The queries of one block read no block."""
    arrays, options = case(48, 64, 2, least=1)
    arrays[3][:, :, 1] = 0
    return arrays, options


CASE = Case(
    function=block_sparse_attention,
    arguments=arguments(),
    dtypes=dict(tpu=("float32", "bfloat16")),
    # The specification's; test_block_sparse_attention.py shows that there are some.
    differentiated=0,
    fixed=dict(
        many_tiles=many_tiles,
        nothing=nothing,
        one_key=lambda: case(1, 1, 1, least=1),
        later_keys=lambda: case(70, 90, 3, of_keys=32, least=1, causal=True),
        more_queries_than_keys=lambda: case(90, 50, 2, causal=True, least=1),
        shared=lambda: (lambda a, o: ((*a[:3], a[3][:, ::2]), o))(
            *case(70, 90, 3, of_keys=32, heads=4, groups=1)
        ),
        dense=lambda: (lambda a, o: ((*a[:3], np.ones_like(a[3])), o))(*case(50, 100, 1)),
    ),
)
