"""What attention over blocks costs at least: two products of what is read, each array once."""

from typing import Any

from jax.experimental import pallas as pl


def forward(
    q: Any,
    k: Any,
    v: Any,
    levels: Any,
    *,
    shares: tuple[float, ...] | None = None,
    **_: Any,
) -> pl.CostEstimate:
    """By shapes and by what part of the blocks is read at each level; None is all at the first."""
    batch, length, heads, size = q.shape
    pairs = batch * heads * length * rows(k.shape[1], shares)
    out = batch * length * heads * v.shape[-1]
    moved = (q.size + k.size + v.size + out) * q.dtype.itemsize + levels.size * levels.dtype.itemsize
    return pl.CostEstimate(
        flops=round(2 * pairs * (size + v.shape[-1])),
        transcendentals=round(pairs),
        bytes_accessed=int(moved),
    )


def rows(length: int, shares: tuple[float, ...] | None) -> float:
    """Keys and means that a query reads."""
    return length * sum(share / 2**level for level, share in enumerate(shares or (1.0,)))
