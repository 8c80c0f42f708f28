"""A checksum of an array that does not depend on how the array is sharded.

Each element is hashed together with its place in the global array, and the hashes are added modulo 2^32.
A sum does not care which device added first, so one array has one fingerprint on one device and on 512;
everything is unsigned integer arithmetic, so the value is exact on every backend.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped, UInt32

from effjax.matching import named_leaves
from effjax.parallel.pace import Pace

# Two odd 32-bit constants (fractional parts of the golden ratio and of sqrt(3)) to tell the streams apart.
_GOLDEN = 0x9E3779B9
_ROOT_THREE = 0xBB67AE85

# Elements up to which an array is read on the host: compiling its sum would take longer than all such arrays.
_SMALL = 2**16


def bits_of(x: Shaped[Array, "..."]) -> UInt32[Array, "..."]:
    """Reinterprets each element as a uint32; wider elements gain a trailing axis of 32-bit words."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    bits = jax.dtypes.itemsize_bits(x.dtype)
    if bits < 8:
        # Through the 4-bit (or narrower) unsigned integer of the same width, whatever the element means.
        return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{bits}")).astype(jnp.uint32)
    word = jnp.dtype(f"uint{min(bits, 32)}")
    return jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)


def _mix(h: Any) -> Any:
    """The 32-bit finaliser of MurmurHash3: a bijection in which every input bit moves every output bit."""
    h = h ^ (h >> np.uint32(16))
    h = h * np.uint32(0x85EBCA6B)
    h = h ^ (h >> np.uint32(13))
    h = h * np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))


def _place(shape: tuple[int, ...], index: Callable[[int], Any]) -> Any:
    """A hash of each element's index in the global array; `index` gives the indices along an axis.

    The row-major index wraps at 2^32, so the leading index is mixed in on its own: two elements share a place
    only if they differ by a multiple of 2^32 within one leading slice.
    """
    flat: Any = np.zeros((1,) * len(shape), np.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        flat = flat + index(axis) * np.uint32(stride % 2**32)
        stride *= shape[axis]
    leading = index(0) if shape else flat
    return _mix(_mix(leading + np.uint32(_GOLDEN)) + flat)


def _hashes(bits: Any, index: Callable[[int], Any]) -> tuple[Any, Any]:
    with np.errstate(over="ignore"):  # numpy says so of single numbers, and wrapping is meant
        place = _place(bits.shape, index)
        first = _mix(bits ^ place)
        return first, _mix(first + place * np.uint32(_ROOT_THREE))


def _add_pairs(left: Any, right: Any) -> Any:
    return left[0] + right[0], left[1] + right[1]


@jax.jit
def fingerprint(x: Shaped[Array, "..."]) -> UInt32[Array, "2"]:
    """Returns the 64-bit fingerprint of an array as two words, with one pass over its elements.

        a_i = mix(bits_i ^ place_i)      b_i = mix(a_i + place_i * odd)
        fingerprint = (sum a_i, sum b_i) mod 2^32

    For a fixed place both hashes are bijections of the bits, so changing any one element, if only by one bit,
    always changes both words. Other alterations (two elements swapped, many changed) go unseen with
    probability 2^-64. -0.0 differs from 0.0 and one NaN from another: bits are compared, not numbers. Shape
    and dtype are not hashed; a manifest keeps them beside the fingerprint.

    Works under `jit` on arrays of any sharding; floats, integers and booleans of 4 to 64 bits.
    """
    bits = bits_of(x)
    first, second = _hashes(bits, lambda axis: jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis))
    # One reduction of the pair: two sums would make XLA store a hash of every element in between.
    zero = np.uint32(0)
    words = jax.lax.reduce((first, second), (zero, zero), _add_pairs, tuple(range(bits.ndim)))
    return jnp.stack(words)


def host_fingerprint(x: Shaped[np.ndarray, "..."]) -> UInt32[np.ndarray, "2"]:
    """The same two words, of an array that lies on the host."""
    bits = _host_bits(x)

    def index(axis: int) -> Any:
        along = np.arange(bits.shape[axis], dtype=np.uint32)
        return along.reshape([-1 if i == axis else 1 for i in range(bits.ndim)])

    return np.array([np.sum(words, dtype=np.uint32) for words in _hashes(bits, index)], np.uint32)


def _host_bits(x: Shaped[np.ndarray, "..."]) -> UInt32[np.ndarray, "..."]:
    """What `bits_of` gives."""
    if x.dtype == np.bool_:
        return x.astype(np.uint32)
    if np.issubdtype(x.dtype, np.complexfloating):
        x = np.stack([x.real, x.imag], axis=-1)
    bits = jax.dtypes.itemsize_bits(x.dtype)
    words = x.reshape(*x.shape, 1).view(np.dtype(f"uint{min(max(bits, 8), 32)}")).astype(np.uint32)
    if bits < 8:
        words &= np.uint32(2**bits - 1)  # narrower than a byte, it lies in one
    return words if bits > 32 else words[..., 0]


def fingerprints(tree: Any) -> dict[str, str]:
    """Returns `{path: 16 hexadecimal digits}` for every array of a pytree.

    Small arrays of this process are read on the host. Others stay where they are: only two words a leaf come
    to the host, together at the end.
    """
    leaves = named_leaves(tree)
    small = {path: leaf for path, leaf in leaves.items() if _is_small(leaf)}
    words, pace = {}, Pace(ahead=8)
    for path, leaf in leaves.items():
        if path not in small:
            # jit keeps its compiled functions by shape, dtype and sharding, of which a model has few.
            words[path] = fingerprint(leaf)
            pace(words[path])
    words = jax.device_get(words)
    words |= {path: host_fingerprint(np.asarray(leaf)) for path, leaf in jax.device_get(small).items()}
    return {path: f"{int(words[path][0]):08x}{int(words[path][1]):08x}" for path in leaves}


def _is_small(leaf: Any) -> bool:
    return leaf.size <= _SMALL and getattr(leaf, "is_fully_addressable", True)
