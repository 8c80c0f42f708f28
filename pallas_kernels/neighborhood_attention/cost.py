"""What attention to neighbours costs at least: products of the reference's tiles, each array once."""

from typing import Any

from jax.experimental import pallas as pl

from pallas_kernels.neighborhood_attention.reference import pairs


def forward(q: Any, k: Any, v: Any, bias: Any = None, *, axes: Any, **_: Any) -> pl.CostEstimate:
    """Two products: the logits and the values."""
    return _estimate(q, bias, axes, products=2, maps=4, biases=1)


def backward(q: Any, k: Any, v: Any, bias: Any, axes: Any) -> pl.CostEstimate:
    """Logits, cotangents of the weights, and those of queries, keys and values."""
    return _estimate(q, bias, axes, products=5, maps=7, biases=2)


def _estimate(q: Any, bias: Any, axes: Any, products: int, maps: int, biases: int) -> pl.CostEstimate:
    heads, size = q.shape[-2:]
    logits = q.shape[0] * heads * pairs(axes)
    moved = maps * q.size * q.dtype.itemsize
    moved += 0 if bias is None else biases * bias.size * bias.dtype.itemsize
    return pl.CostEstimate(flops=2 * products * logits * size, transcendentals=logits, bytes_accessed=moved)
