"""What primitives of JAX compute, in NumPy: enough for indices, and for the bodies of kernels."""

from collections.abc import Callable
from typing import Any

import numpy as np


def _divide(a: Any, b: Any, **_: Any) -> Any:
    """As the hardware: whole numbers are cut towards zero."""
    if not np.issubdtype(a.dtype, np.integer):
        return a / b
    quotient = np.abs(a.astype(np.int64)) // np.abs(b.astype(np.int64))
    return quotient * np.sign(a) * np.sign(b)


def _remainder(a: Any, b: Any, **_: Any) -> Any:
    return np.fmod(a, b)


def _iota(*, dtype: Any, shape: tuple[int, ...], dimension: int, **_: Any) -> Any:
    along = [1] * len(shape)
    along[dimension] = shape[dimension]
    return np.broadcast_to(np.arange(shape[dimension], dtype=dtype).reshape(along), shape)


def _broadcast(a: Any, *, shape: tuple[int, ...], broadcast_dimensions: tuple[int, ...], **_: Any) -> Any:
    sides = [1] * len(shape)
    for axis, side in zip(broadcast_dimensions, a.shape, strict=True):
        sides[axis] = side
    return np.broadcast_to(a.reshape(sides), shape)


def _slice(a: Any, *, start_indices: Any, limit_indices: Any, strides: Any, **_: Any) -> Any:
    return a[tuple(map(slice, start_indices, limit_indices, strides or [None] * a.ndim))]


def _select(chosen: Any, *cases: Any, **_: Any) -> Any:
    if len(cases) != 2:
        raise NotImplementedError("select_n of other than two cases")
    return np.where(chosen, cases[1], cases[0])


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *operands, **_: function(*operands)


def _widened(function: Callable[[Any], Any]) -> Callable[..., Any]:
    """Functions of floats, in float32 at least: NumPy has none of them in bfloat16."""
    return lambda a, **_: function(a.astype(np.float32) if a.dtype.itemsize < 4 else a)


def _bits(a: Any, new_dtype: Any, **_: Any) -> Any:
    return a.view(new_dtype)


NUMPY: dict[str, Callable[..., Any]] = {
    "add": _plain(np.add),
    "sub": _plain(np.subtract),
    "mul": _plain(np.multiply),
    "div": _divide,
    "rem": _remainder,
    "max": _plain(np.maximum),
    "min": _plain(np.minimum),
    "neg": _plain(np.negative),
    "sign": _plain(np.sign),
    "abs": _plain(np.abs),
    "and": _plain(np.bitwise_and),
    "or": _plain(np.bitwise_or),
    "xor": _plain(np.bitwise_xor),
    "not": _plain(np.invert),
    "eq": _plain(np.equal),
    "ne": _plain(np.not_equal),
    "lt": _plain(np.less),
    "le": _plain(np.less_equal),
    "gt": _plain(np.greater),
    "ge": _plain(np.greater_equal),
    "shift_left": _plain(np.left_shift),
    "shift_right_arithmetic": _plain(np.right_shift),
    "shift_right_logical": lambda a, b, **_: (a.view(f"u{a.itemsize}") >> b.view(f"u{b.itemsize}")).view(
        a.dtype
    ),
    "exp": _widened(np.exp),
    "exp2": _widened(np.exp2),
    "log": _widened(np.log),
    "tanh": _widened(np.tanh),
    "logistic": _widened(lambda a: 0.5 + 0.5 * np.tanh(0.5 * a)),
    "sqrt": _widened(np.sqrt),
    "rsqrt": _widened(lambda a: 1 / np.sqrt(a)),
    "floor": _widened(np.floor),
    "integer_pow": lambda a, y, **_: a**y,
    "square": lambda a, **_: a * a,
    "select_n": _select,
    "convert_element_type": lambda a, new_dtype, **_: a.astype(new_dtype),
    "bitcast_convert_type": _bits,
    "broadcast_in_dim": _broadcast,
    "iota": _iota,
    "reshape": lambda a, new_sizes, **_: a.reshape(new_sizes),
    "slice": _slice,
    "squeeze": lambda a, dimensions, **_: a.squeeze(dimensions),
    "transpose": lambda a, permutation, **_: a.transpose(permutation),
    "reduce_sum": lambda a, axes, **_: a.sum(axis=axes),
    "reduce_max": lambda a, axes, **_: a.max(axis=axes),
    "clamp": lambda low, a, high, **_: np.clip(a, low, high),
}
