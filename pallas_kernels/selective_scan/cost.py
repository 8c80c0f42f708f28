"""What a scan costs at least: one exponential a state and token, and every array once.

Of operations the products with C count, as products of matrices do elsewhere; what is elementwise does not.
"""

from typing import Any

from jax.experimental import pallas as pl


def forward(
    u: Any, dt: Any, A: Any, B: Any, C: Any, hidden: Any = None, decay: Any = None, **_: Any
) -> pl.CostEstimate:
    """Reads all arguments, writes the outputs and the last state."""
    moved = _bytes(u, dt, A, B, C, hidden, decay) + _bytes(u) + _state(u, A)
    return _estimate(u, A, moved, products=1, powers=1)


def starts(u: Any, dt: Any, A: Any, B: Any, hidden: Any, decay: Any, chunks: int) -> pl.CostEstimate:
    """The same without outputs, of which the state before every chunk is kept."""
    moved = _bytes(u, dt, A, B, hidden, decay) + chunks * _state(u, A)
    return _estimate(u, A, moved, products=0, powers=1)


def backward(
    u: Any, dt: Any, A: Any, B: Any, C: Any, hidden: Any, decay: Any, chunks: int
) -> pl.CostEstimate:
    """Reads what forward does, the cotangents and the states before chunks; writes cotangents."""
    arguments = _bytes(u, dt, A, B, C, hidden, decay)
    moved = 2 * arguments + _bytes(u) + (chunks + 1) * _state(u, A)
    return _estimate(u, A, moved, products=4, powers=2)


def _bytes(*arrays: Any) -> int:
    return sum(array.size * array.dtype.itemsize for array in arrays if array is not None)


def _state(u: Any, A: Any) -> int:
    """Bytes of one float32 state of all rows."""
    return 4 * u.shape[0] * A.size


def _estimate(u: Any, A: Any, moved: int, products: int, powers: int) -> pl.CostEstimate:
    states = u.shape[0] * u.shape[1] * A.size
    return pl.CostEstimate(flops=2 * products * states, transcendentals=powers * states, bytes_accessed=moved)
