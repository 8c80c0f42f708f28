"""Which products of a training step run in another arithmetic, and how they come to.

The step casts its parameters and then puts an `Operand` in the place of each chosen kernel, as compression
does for good (`effjax.layers.stored`). `Dense` asks it for the product. What multiplies in another way (a
convolution, experts) asks for the whole array, and gets numbers that were rounded as the operands of a
product are; its sums, and its products on the way back, are those of the run's own precision.

Products without a kernel, those of attention among them, stay as they are.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from effjax.compress.storage.trees import leaves_of, replaced
from effjax.errors import UsageError
from effjax.layers.stored import Place, Stored, kernels
from effjax.matching import match
from effjax.train.step import Precision

Axes = tuple[int, ...]
WHERE = "config.train.arithmetic"


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """The base of the kinds: which kernels, and what their products are.

    Attributes:
      kernels: regexps of whole paths of parameters.
      leave: regexps of kernels that multiply as before, whatever `kernels` says.
    """

    kernels: tuple[str, ...] = ("(.*/)?(blocks|stack)/.*",)
    leave: tuple[str, ...] = ()

    def check(self) -> None:
        """Whether this can run here at all.

        Raises:
          UsageError: where a package is missing.
        """

    def product(
        self, x: Float[Array, "..."], kernel: Float[Array, "..."], contracted: tuple[Axes, Axes]
    ) -> Float[Array, "..."]:
        """Sums over pairs of axes, as `dot_general` does; operands and result have one dtype."""
        raise NotImplementedError

    def rounded(self, x: Float[Array, "..."], summed: Axes) -> Float[Array, "..."]:
        """The numbers that an operand is rounded to, with the gradient of identity.

        Args:
          x: the operand.
          summed: the axes that the product sums over.
        """
        raise NotImplementedError


@flax.struct.dataclass
class Operand(Stored):
    """A kernel whose products run in an arithmetic.

    Attributes:
      kernel: the array.
      arithmetic: what its products are.
      ins: how many axes are summed over.
      outs: how many axes the product has.
      turned: whether the array has `outs` before `ins`.
    """

    kernel: Any
    arithmetic: Arithmetic = flax.struct.field(pytree_node=False)
    ins: int = flax.struct.field(pytree_node=False)
    outs: int = flax.struct.field(pytree_node=False)
    turned: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return tuple(self.kernel.shape)

    @property
    def _summed(self) -> Axes:
        front = self.kernel.ndim - self.ins - self.outs
        start = front + self.outs if self.turned else front
        return tuple(range(start, start + self.ins))

    def whole(self, dtype: DTypeLike) -> Float[Array, "..."]:
        """The array, rounded."""
        return self.arithmetic.rounded(self.kernel, self._summed).astype(dtype)

    def entering(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """What enters, rounded, with one range for each example where there are several."""
        return self.arithmetic.rounded(x, tuple(range(1, x.ndim)))

    def product(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Maps `[..., *ins]` to `[..., *outs]`."""
        contracted = tuple(range(x.ndim - self.ins, x.ndim)), self._summed
        return self.arithmetic.product(x, self.kernel.astype(x.dtype), contracted)

    def take(self, rows: Int[Array, "*n"]) -> Float[Array, "*n c"]:
        """Rows of a table as they are: a look-up multiplies nothing."""
        return jnp.take(self.kernel, rows, axis=0)


@dataclasses.dataclass(frozen=True, eq=False)
class InFewerBits(Precision):
    """A precision under which chosen kernels multiply in an arithmetic.

    Attributes:
      arithmetic: what products are.
      places: the kernels by path.
    """

    arithmetic: Arithmetic = dataclasses.field(default_factory=Arithmetic)
    places: Mapping[str, Place] = dataclasses.field(default_factory=dict)

    def cast(self, tree: Any) -> Any:
        """Casts, and puts operands in the place of kernels."""
        tree = super().cast(tree)
        leaves = leaves_of(tree)
        made = {
            path: Operand(leaves[path], self.arithmetic, len(place.ins), len(place.outs), place.turned)
            for path, place in self.places.items()
        }
        return replaced(tree, made)


def within(arithmetic: Arithmetic, precision: Precision, boxed: Any) -> InFewerBits:
    """The precision of a training step in this arithmetic.

    Args:
      arithmetic: what products are, and of which kernels.
      precision: what everything else computes in.
      boxed: freshly initialised parameters or their shapes, in their boxes.

    Raises:
      UsageError: for a pattern that matches no kernel, where none is left, or where a package is missing.
    """
    arithmetic.check()
    places = kernels(boxed)
    if not places:
        raise UsageError(f"{WHERE}: this model has no kernels that are arrays. Set it to None.")
    tree: dict[str, Any] = dict.fromkeys(places, 0)
    wanted, left = (
        match([(pattern, True) for pattern in patterns], tree, default=False, where=f"{WHERE}.{name}")
        for name, patterns in (("kernels", arithmetic.kernels), ("leave", arithmetic.leave))
    )
    found = {path: place for path, place in places.items() if wanted[path] and not left[path]}
    if not found:
        raise UsageError(
            f"{WHERE}.leave={arithmetic.leave} leaves no kernel of those in {WHERE}.kernels="
            f"{arithmetic.kernels}: leave out fewer. The kernels are {', '.join(list(places)[:6])}."
        )
    return InFewerBits(precision.compute, arithmetic, found)


@jax.custom_vjp
def straight_through(x: Float[Array, "..."], rounded: Float[Array, "..."]) -> Float[Array, "..."]:
    """`rounded`, with the gradient of `x`."""
    del x
    return rounded


def _forward(x: Array, rounded: Array) -> tuple[Array, None]:
    del x
    return rounded, None


def _backward(_: None, g: Array) -> tuple[Array, Array]:
    return g, jnp.zeros_like(g)


straight_through.defvjp(_forward, _backward)
