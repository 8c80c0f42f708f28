"""One case a kernel: what the numeric suite draws for it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st

# How far a result may be off, of the largest number in the float32 result.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 4e-3}


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments for a kernel.

    Attributes:
      function: the public function.
      arguments: draws `(arrays, options)`: NumPy arrays of float32 or integers, and keyword arguments.
      dtypes: those that each implementation takes.
      differentiated: how many of the arrays, the first ones, have cotangents.
      fixed: named arguments that every implementation must try.
    """

    function: Callable[..., Any]
    arguments: st.SearchStrategy
    dtypes: dict[str, tuple[str, ...]]
    differentiated: int
    fixed: dict[str, Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]]
