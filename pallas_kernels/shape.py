"""A shape that a kernel is measured and compiled at."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Shape:
    """Arguments of a kernel's public function.

    Attributes:
      name: unique among those of the kernel.
      config: the config that has it.
      arrays: positional arguments.
      options: keyword arguments.
      part: the arguments of so many parts that are done alike, such as heads, as there are `parts` of in all.
      parts: how many.
      trained: whether it is also differentiated there.
    """

    name: str
    config: str
    arrays: tuple[jax.ShapeDtypeStruct, ...]
    options: dict[str, Any]
    part: Callable[[int], tuple[jax.ShapeDtypeStruct, ...]]
    parts: int
    trained: bool = True


def array(shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    """Short for `jax.ShapeDtypeStruct`."""
    return jax.ShapeDtypeStruct(shape, dtype)
