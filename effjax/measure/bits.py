"""How many bytes a value takes, sub-byte types at their width."""

import math
from typing import Any

import jax
import jax.numpy as jnp


def bits_of(dtype: Any) -> int:
    """Width of one element in bits; numpy gives four-bit types a whole byte.

    A random key counts 64, as the default generator's does.
    """
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return 64
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.finfo(dtype).bits
    return dtype.itemsize * 8


def bytes_of(aval: Any) -> int:
    """Bytes of an array of this shape and dtype, packed; what is no array (a token) takes none."""
    if not hasattr(aval, "dtype"):
        return 0
    return math.ceil(math.prod(aval.shape) * bits_of(aval.dtype) / 8)
