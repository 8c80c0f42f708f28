"""Kernels that are not stored as they are: fewer bits, factors, codes.

A parameter tree may hold, where a definition wants the array of a kernel, an object that knows how to
multiply by it. The definition does not change: `Dense` asks the object for the product, and what does not
multiply (a convolution, experts) asks for the whole array.

    y[..., o] = sum_i x[..., i] W[i, o]            W never stands in memory where `product` can help it

Which parameters are kernels, and which of their axes are summed over, is said where they are initialised:
see `kernel_of` and `Kernel`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.core import meta
from jaxtyping import Array, DTypeLike, Float, Int

from effjax.matching import path_of

# The collection of what a stored kernel keeps beside the parameters, at its own path.
RANGES = "ranges"


class Stored:
    """The base of what stands in a tree in the place of a kernel. A subclass is a pytree."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array, with the axes that were put in front (layers, experts)."""
        raise NotImplementedError

    def whole(self, dtype: DTypeLike) -> Float[Array, "..."]:
        """The array."""
        raise NotImplementedError

    def product(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Maps `[..., *ins]` to `[..., *outs]`, in the dtype of x; only where no axis is in front."""
        raise NotImplementedError

    def entering(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """What a layer that asks for the whole array puts in the place of x; `product` does so itself."""
        return x

    def within(self, module: nn.Module, name: str) -> "Stored":
        """The same for one use in a module, whose variables it may read and keep.

        Args:
          module: whose parameter it is.
          name: of the parameter.
        """
        del module, name
        return self

    def beside(self) -> dict[str, Any]:
        """What stands for this kernel in the collection `ranges` at the start; nothing for most."""
        return {}

    def take(self, rows: Int[Array, "*n"]) -> Float[Array, "*n c"]:
        """Rows of a table."""
        return jnp.take(self.whole(jnp.float32), rows, axis=0)


class Kernel(nn.LogicallyPartitioned):
    """The box of a kernel at initialisation: beside the names of its axes, which of them are summed over.

    Attributes:
      ins: how many axes are summed over.
      outs: how many axes the product has; what is in front of both is one kernel each.
      turned: whether the axes of the product stand before those that are summed over, as in a table.
    """

    ins: int = flax.struct.field(pytree_node=False, default=1)
    outs: int = flax.struct.field(pytree_node=False, default=1)
    turned: bool = flax.struct.field(pytree_node=False, default=False)


def kernel_of(
    init: Callable[..., Array], axes: Sequence[str | None], ins: int, outs: int, turned: bool = False
) -> Callable[..., Kernel]:
    """Attaches to what an initialiser makes the names of its axes, and which of them are summed over."""

    def boxed(*args: Any) -> Kernel:
        return Kernel(init(*args), tuple(axes), ins=ins, outs=outs, turned=turned)

    return boxed


def parameter(module: nn.Module, name: str, init: Callable[..., Any], *args: Any) -> Any:
    """`module.param`, that may return a `Stored` where one stands in the tree."""
    if module.has_variable("params", name):
        value = meta.unbox(module.get_variable("params", name))
        if isinstance(value, Stored):
            return value.within(module, name)
    return module.param(name, init, *args)


def array(module: nn.Module, name: str, init: Callable[..., Any], *args: Any, dtype: DTypeLike) -> Array:
    """`module.param`, with what is stored otherwise as the whole array."""
    value = parameter(module, name, init, *args)
    return jnp.asarray(value.whole(dtype) if isinstance(value, Stored) else value)


def dtype_of(params: Any) -> jnp.dtype:
    """What a network with these parameters computes in: what their floating-point leaves promote to.

    What a `Stored` holds says nothing of it, unless there is nothing else.
    """
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, Stored))
    outside = [leaf for leaf in leaves if not isinstance(leaf, Stored)]
    for held in (outside, jax.tree.leaves(params)):
        if floats := [leaf.dtype for leaf in held if jnp.issubdtype(leaf.dtype, jnp.floating)]:
            return jnp.result_type(*floats)
    raise ValueError("no parameter is a real number.")


@dataclasses.dataclass(frozen=True)
class Place:
    """A kernel in a tree.

    Attributes:
      shape: of the array, with axes in front.
      names: of its axes.
      ins: sizes of the axes that are summed over.
      outs: sizes of those of the product.
      turned: whether `outs` stand before `ins`.
      path: where it stands; kernels of one form are alike wherever they are.
    """

    shape: tuple[int, ...]
    names: tuple[str | None, ...]
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    turned: bool
    path: str = dataclasses.field(default="", compare=False)

    @property
    def front(self) -> tuple[int, ...]:
        """Sizes of the axes before those of one kernel."""
        return self.shape[: len(self.shape) - len(self.ins) - len(self.outs)]

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of one kernel as a matrix."""
        return math.prod(self.ins), math.prod(self.outs)


def kernels(boxed: Mapping[str, Any]) -> dict[str, Place]:
    """The kernels of freshly initialised parameters by path.

    Args:
      boxed: as `init` makes them, arrays or shapes, in their boxes.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(boxed, is_leaf=lambda leaf: isinstance(leaf, Kernel))
    found = {}
    for key_path, box in leaves:
        if not isinstance(box, Kernel):
            continue
        shape = tuple(box.value.shape)
        own = shape[len(shape) - box.ins - box.outs :]
        ins, outs = (own[box.outs :], own[: box.outs]) if box.turned else (own[: box.ins], own[box.ins :])
        path = path_of(key_path)
        found[path] = Place(shape, tuple(box.names), ins, outs, box.turned, path)
    return found
