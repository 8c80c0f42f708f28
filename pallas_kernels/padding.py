"""Arrays whose sides are multiples of a block."""

import jax
import jax.numpy as jnp


def rounded(length: int, unit: int) -> int:
    """The next multiple of a unit.

    >>> rounded(65, 64)
    128
    """
    return -(-length // unit) * unit


def padded(array: jax.Array, axis: int, unit: int) -> jax.Array:
    """Appends zeros along an axis up to the next multiple of a unit; copies nothing where it is one."""
    missing = rounded(array.shape[axis], unit) - array.shape[axis]
    if not missing:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, missing)
    return jnp.pad(array, widths)
