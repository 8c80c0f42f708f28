"""Shapes that decoding is measured and compiled at, with the configs they come from.

Lengths and page tables are numbers and no shapes: they decide what is read.
"""

from typing import Any

import numpy as np

from pallas_kernels.decode_attention.within import Within
from pallas_kernels.shape import Shape, array


def _lengths(batch: int, most: int) -> np.ndarray:
    """From all slots down to half of them."""
    return np.linspace(most, most // 2, batch).astype(np.int32)


def _pages(batch: int, each: int) -> np.ndarray:
    """Pages in no order."""
    return np.random.default_rng(0).permutation(batch * each).reshape(batch, each).astype(np.int32)


def _rows(batch: int, slots: int) -> tuple[Any, ...]:
    """Llama 3 8B's heads: 32 of queries, 8 of keys."""
    cached = array((batch, slots, 8, 128))
    return array((batch, 1, 32, 128)), cached, cached, _lengths(batch, slots)


def _paged(batch: int) -> tuple[Any, ...]:
    """Pages of 64 slots, four tokens a row, as speculative decoding checks them."""
    cached = array((batch * 128, 64, 8, 128))
    return array((batch, 4, 32, 128)), cached, cached, _lengths(batch, 8192), _pages(batch, 128)


def _shape(name: str, part: Any, batch: int, **options: Any) -> Shape:
    return Shape(
        name=name,
        config="configs/language/lm.py:8b",
        arrays=part(batch),
        options=options,
        part=part,
        parts=batch,
        trained=False,
    )


SHAPES = (
    # One long sequence, many shorter ones, and by a unified maximum.
    _shape("lm_8b_alone", lambda batch: _rows(batch, 8192), 1),
    _shape("lm_8b_many", lambda batch: _rows(batch, 4096), 32),
    _shape("lm_8b_unified", lambda batch: _rows(batch, 8192), 16, within=Within()),
    _shape("lm_8b_paged", _paged, 16),
)
