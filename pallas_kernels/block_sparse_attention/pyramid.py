"""Keys and values at several resolutions, and how many keys each of them stands for."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.padding import padded


def resolutions(array: jax.Array, axis: int, depth: int, block: int) -> list[jax.Array]:
    """An array, and the means of pairs, of fours and so on; whole blocks, where what is missing has no part.

    Args:
      array: keys or values.
      axis: of their places.
      depth: how many arrays are wanted.
      block: a multiple of 2^(depth-1), up to which places are filled up with zeros.
    """
    length = array.shape[axis]
    finer = padded(array, axis, block)
    found = [finer]
    weight = counts(length, finer.shape[axis], 0)
    shape = [1] * array.ndim
    for level in range(1, depth):
        # In float32, as sums: a mean of few is of those that there are.
        pairs = finer.astype(jnp.float32) * weight.reshape([*shape[:axis], -1, *shape[axis + 1 :]])
        half = (*pairs.shape[:axis], pairs.shape[axis] // 2, 2, *pairs.shape[axis + 1 :])
        weight = counts(length, half[axis], level)
        sums = jnp.sum(pairs.reshape(half), axis=axis + 1)
        finer = sums / np.maximum(weight, 1).reshape([*shape[:axis], -1, *shape[axis + 1 :]])
        found.append(finer.astype(array.dtype))
    return found


def counts(length: int, places: int, level: int) -> np.ndarray:
    """`[places]` float32: how many of so many keys each place of a level stands for, counted from 0."""
    each = 2**level
    return np.clip(length - np.arange(places) * each, 0, each).astype(np.float32)
