"""What stands between the products of a transformer, on numbers in blocks with a shift each.

    gelu         c' , s' = T[s, c]              a table for every shift s, of an entry a code
    softmax      e = E[ round(16 (max x - x)) ],  p = e / sum e          256 entries of 16 bits
    layer norm   mean and variance from sums of codes and of their squares a block, in integers;
                 1 / sqrt(v) = R[mantissa of v] 2^(-exponent / 2)        512 entries

Results are in blocks again. Tables are made in float64 when a program is traced.

Dong and Chen 2023, arXiv:2304.01483, compresses these functions by tables as well; how its tables are laid
out could not be read, and is ours.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from effjax.compress.storage.shift import LOWEST, SHIFT_BITS, Blocks, blocked, power

# Differences in a softmax are told apart in steps of 1 / _STEPS; 255 of them are e^-16.
_STEPS, _ENTRIES = 16, 256


def elementwise(x: Blocks, function: Callable[[Any], Any], bits: int = 8) -> Blocks:
    """A function of every number, by a table for each shift.

    Args:
      x: the numbers, of at most 8 bits.
      function: of float64 arrays of NumPy.
      bits: of the codes of the result.
    """
    codes, shifts = _table(function, bits)
    row = x.shift + LOWEST  # [..., n]
    return Blocks(
        jnp.asarray(codes)[row[..., None], x.codes.astype(jnp.int32) + 128], jnp.asarray(shifts)[row]
    )


@functools.lru_cache
def _table(function: Callable[[Any], Any], bits: int) -> tuple[Any, Any]:
    """Codes `[shifts, 256]` of the results, and the shift of each row."""
    numbers = np.ldexp(
        np.arange(-128, 128, dtype=np.float64)[None], np.arange(2**SHIFT_BITS)[:, None] - LOWEST
    )
    results = function(numbers)
    largest = 2 ** (bits - 1) - 1
    mantissa, exponent = np.frexp(np.abs(results).max(1) / largest)
    shifts = np.clip(exponent - (mantissa == 0.5), -LOWEST, 2**SHIFT_BITS - 1 - LOWEST)
    codes = np.clip(np.round(np.ldexp(results, -shifts[:, None])), -largest, largest)
    return codes.astype(np.int8), shifts.astype(np.int32)


def gelu(x: Blocks, bits: int = 8) -> Blocks:
    """x Phi(x)."""
    return elementwise(x, _gelu, bits)


def _gelu(x: Any) -> Any:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))


def softmax(x: Blocks, bits: int = 8) -> Blocks:
    """e^x / sum e^x over all blocks of a row."""
    numbers, size = x.numbers(), x.codes.shape[-1]  # [..., C]
    behind = jnp.max(numbers, -1, keepdims=True) - numbers  # [..., C], of multiples of powers of two
    at = jnp.clip(jnp.round(behind * _STEPS), 0, _ENTRIES - 1).astype(jnp.int32)
    entries = np.round(np.exp(-np.arange(_ENTRIES) / _STEPS) * (2**16 - 1)).astype(np.int32)
    powers = jnp.asarray(entries)[at]  # [..., C] int32, the sum of 32,768 of which fits
    return blocked(powers / jnp.sum(powers, -1, keepdims=True), size, bits)


def layer_norm(
    x: Blocks,
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    epsilon: float = 1e-6,
    bits: int = 8,
) -> Blocks:
    """(x - mean) / sqrt(variance + epsilon) scale + bias over all blocks of a row."""
    codes, one = x.codes.astype(jnp.int32), power(x.shift)  # [..., n, size], [..., n]
    size = codes.shape[-1]
    count = codes.shape[-2] * size
    total = jnp.sum(jnp.sum(codes, -1) * one, -1) / count  # [...]
    square = jnp.sum(jnp.sum(codes * codes, -1) * one * one, -1) / count  # [...]
    root = reciprocal_root(square - total * total + epsilon)  # [...]
    y = (x.numbers() - total[..., None]) * root[..., None]
    return blocked(
        y * scale.reshape((1,) * (y.ndim - 1) + (-1,)) + bias.reshape((1,) * (y.ndim - 1) + (-1,)), size, bits
    )


def reciprocal_root(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """1 / sqrt(x) by a table of the mantissa, for exponents that are even and for odd ones."""
    mantissa, exponent = jnp.frexp(x)  # mantissa in [1/2, 1)
    odd = exponent % 2
    middles = 0.5 + (np.arange(_ENTRIES) + 0.5) / (2 * _ENTRIES)
    table = jnp.asarray(np.stack([middles**-0.5, (2 * middles) ** -0.5]), jnp.float32)  # [2, 256]
    at = ((mantissa - 0.5) * 2 * _ENTRIES).astype(jnp.int32)
    return jnp.ldexp(table[odd, jnp.clip(at, 0, _ENTRIES - 1)], -((exponent - odd) // 2))
