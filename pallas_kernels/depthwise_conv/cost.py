"""What a depthwise convolution costs at least: a multiplication and an addition a tap, each array once."""

from typing import Any

from jax.experimental import pallas as pl


def forward(x: Any, kernel: Any, bias: Any = None, **_: Any) -> pl.CostEstimate:
    """One sum over the taps."""
    return _estimate(x, kernel, bias, sums=1, maps=2)


def backward(x: Any, kernel: Any, bias: Any, activation: str) -> pl.CostEstimate:
    """A sum for each cotangent, and one for what went into the activation."""
    return _estimate(x, kernel, bias, sums=2 + (activation != "none"), maps=3)


def _estimate(x: Any, kernel: Any, bias: Any, sums: int, maps: int) -> pl.CostEstimate:
    read = kernel.size * kernel.dtype.itemsize + (0 if bias is None else bias.size * bias.dtype.itemsize)
    taps = kernel.shape[0] * kernel.shape[1]
    return pl.CostEstimate(
        flops=2 * sums * taps * x.size,
        transcendentals=0,
        bytes_accessed=maps * x.size * x.dtype.itemsize + (maps - 1) * read,
    )
