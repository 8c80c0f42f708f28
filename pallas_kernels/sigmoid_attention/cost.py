"""What sigmoid attention costs at least: products of a tile, one exponential a logit, each array once."""

from typing import Any

from jax.experimental import pallas as pl


def forward(q: Any, k: Any, v: Any, segments: Any = None, *, causal: bool, **_: Any) -> pl.CostEstimate:
    """Two products: the logits and the values."""
    return _estimate(
        q, k, v, causal, [q.shape[-1], v.shape[-1]], [q, k, v], q.size // q.shape[-1] * v.shape[-1]
    )


def backward_queries(q: Any, k: Any, v: Any, *, causal: bool) -> pl.CostEstimate:
    """Logits, cotangents of the weights, cotangents of the queries."""
    sizes = [q.shape[-1], v.shape[-1], q.shape[-1]]
    return _estimate(q, k, v, causal, sizes, [q, k, v], q.size + q.size // q.shape[-1] * v.shape[-1])


def backward_keys(q: Any, k: Any, v: Any, *, causal: bool) -> pl.CostEstimate:
    """Logits, cotangents of the weights, of the values and of the keys."""
    sizes = [q.shape[-1], v.shape[-1], v.shape[-1], q.shape[-1]]
    return _estimate(q, k, v, causal, sizes, [q, k, v], k.size + v.size + q.size // q.shape[-1] * v.shape[-1])


def _estimate(
    q: Any, k: Any, v: Any, causal: bool, sizes: list[int], read: list[Any], more: int
) -> pl.CostEstimate:
    queries, keys = q.shape[1], k.shape[1]
    pairs = queries * keys
    if causal:
        first = max(keys - queries, 0)
        seeing = min(queries, keys)
        pairs = first * seeing + seeing * (seeing + 1) // 2
    pairs *= q.shape[0] * q.shape[2]
    moved = (sum(array.size for array in read) + more) * q.dtype.itemsize
    return pl.CostEstimate(flops=2 * pairs * sum(sizes), transcendentals=2 * pairs, bytes_accessed=moved)
