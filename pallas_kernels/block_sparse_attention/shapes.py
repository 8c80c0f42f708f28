"""Shapes that attention over blocks is measured and compiled at, with the configs they come from."""

from typing import Any

import jax.numpy as jnp

from pallas_kernels.shape import Shape, array

BLOCK = 128


def _shape(
    name: str,
    config: str,
    length: int,
    heads: int,
    groups: int,
    size: int,
    lists: int,
    shares: tuple[float, ...],
    causal: bool = False,
) -> Shape:
    each, depth = heads // groups, len(shares)
    number = -(-length // BLOCK)

    def arrays(queries: int, keys: int, groups: int) -> tuple[Any, ...]:
        of_keys = array((1, keys, groups, size))
        levels = array((1, groups * (lists * each // heads), queries // BLOCK, keys // BLOCK), jnp.int32)
        return array((1, queries, groups * each, size)), of_keys, of_keys, levels

    # To the profiler there are as many tiles as there can be, all of the last level's small pieces: a part
    # has keys for as many as are read.
    tile = 1024 if depth == 1 else 512
    tiles = sum(-(-round(number * share) * BLOCK // (tile << level)) for level, share in enumerate(shares))
    keys = tile * max(tiles - depth + 1, 1)
    return Shape(
        name=name,
        config=config,
        arrays=arrays(length, length, groups),
        options=dict(depth=depth, shares=shares, causal=causal),
        part=lambda parts: arrays(BLOCK * parts, keys, 1),
        parts=groups * number,
        trained=False,
    )


# Llama 3 8B with a text of its whole length. First by blocks, of which the queries of a head of keys read 16
# where there are that many: DHSA's budget. Then by a pyramid of each head's own, with no causal mask: 10% of
# the blocks as they are, 5% as means of two, 20% as means of eight, PSA's code by default.
SHAPES = (
    _shape("lm_8b_blocks", "configs/language/lm.py:8b", 8192, 32, 8, 128, 8, (0.22,), causal=True),
    _shape("lm_8b_pyramid", "configs/language/lm.py:8b", 8192, 32, 8, 128, 32, (0.1, 0.05, 0.0, 0.2)),
)
