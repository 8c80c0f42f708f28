"""Training through rounding: weights and what enters lie on their grids, gradients pass straight through.

    forward      x_q = s (clip( round(x / s) + z ) - z)
    backward     dL/dx = dL/dx_q  where the code was not clipped,  0 where it was

The kernel in the tree is the float one, and is what the optimiser moves; its grid is fitted anew at every
step. What enters has the range that training saw, an average that moves,

    low <- d low + (1 - d) min x,    high <- d high + (1 - d) max x,    d = 0.99

in the collection `ranges`, beside the parameters as batch statistics are. It is followed from the first step,
and rounds after `delay` of them: a range that has not settled clips what has not settled either.

A network is trained so in three runs: the recipe `[fake_quantise]` turns the folder of a trained run into one
whose kernels are these; that folder is trained on with the ordinary driver and a small learning rate; the
recipe `[freeze]` turns the result into codes. Steps: `effjax.compress.steps.fake_quantise`.

Krishnamoorthi 2018, arXiv:1806.08342, sections 2.4 and 3.2; Jacob et al. 2018, arXiv:1712.05877, section 3.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from effjax.compress.rounding import fake_fitted, straight_through
from effjax.compress.storage.inputs import Static, affine_grid
from effjax.compress.storage.matrices import FloatKernel
from effjax.compress.storage.uniform import Uniform
from effjax.errors import UsageError
from effjax.layers.stored import RANGES, Place, Stored


def fake_inputs(
    x: Float[Array, "..."], low: Float[Array, ""], high: Float[Array, ""], bits: int
) -> Float[Array, "..."]:
    """What enters, on the grid of a range, with the gradient of identity inside it."""
    scale, zero = affine_grid(jax.lax.stop_gradient(low), jax.lax.stop_gradient(high), bits)
    one = (1,) * x.ndim
    return straight_through(x, scale.reshape(one), zero.reshape(one), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


@dataclasses.dataclass(frozen=True)
class Fake:
    """A layout of float weights that are used as if they were codes.

    Attributes:
      weights: the codes.
      inputs: the grid of what enters; None leaves it as it is.
      decay: of the moving range.
      delay: training steps before what enters is rounded.
    """

    weights: Uniform = dataclasses.field(default_factory=lambda: Uniform(8, 0))
    inputs: Static | None = dataclasses.field(default_factory=Static)
    decay: float = 0.99
    delay: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise UsageError(f"decay={self.decay} must be at least 0 and below 1.")
        if self.delay < 0:
            raise UsageError(f"delay={self.delay} must be at least 0.")

    def groups(self, rows: int, where: str = "the matrix") -> int:
        """How many groups of weights there are, see `Uniform.groups`."""
        return self.weights.groups(rows, where)

    def bits_a_weight(self, rows: int, columns: int) -> float:
        """Bits that a weight takes while it is trained."""
        del rows, columns
        return 32.0

    def store(self, kernel: Float[Array, "..."], place: Place) -> "FakeQuantised":
        """A kernel in this layout."""
        return FakeQuantised(kernel, self, place.ins, place.outs, place.turned)

    def names(self, place: Place) -> "FakeQuantised":
        """Names of the axes of what `store` makes."""
        return FakeQuantised(place.names, self, place.ins, place.outs, place.turned)


@flax.struct.dataclass
class FakeQuantised(FloatKernel):
    """A float kernel that is trained, and used as if it were codes; `within` rounds what enters."""

    def matrix(self) -> Float[Array, "*front k n"]:
        """All weights as matrices, as if they were codes."""
        return fake_fitted(self.layout.weights, super().matrix())

    def within(self, module: nn.Module, name: str) -> Stored:
        """The kernel with the range that the module keeps of what enters; without one, the kernel itself."""
        return _Followed(self, module, name) if module.has_variable(RANGES, name) else self

    def beside(self) -> dict[str, Any]:
        """What stands in `ranges` for this kernel before the first step; nothing where inputs stay."""
        if self.layout.inputs is None:
            return {}
        front = self.place.front
        return {"low": jnp.zeros(front), "high": jnp.zeros(front), "steps": jnp.zeros(front, jnp.int32)}


class _Followed(Stored):
    """A kernel in its module: follows in training what enters, and rounds it."""

    def __init__(self, kernel: FakeQuantised, module: nn.Module, name: str) -> None:
        self.kernel, self.module, self.name = kernel, module, name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kernel.shape

    def whole(self, dtype: DTypeLike) -> Float[Array, "..."]:
        return self.kernel.whole(dtype)

    def product(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        return self.kernel.product(self.entering(x))

    def entering(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        layout = self.kernel.layout
        known: dict[str, Array] = self.module.get_variable(RANGES, self.name)
        assert layout.inputs is not None
        rounds = known["steps"] >= layout.delay
        if self.module.is_mutable_collection(RANGES):
            seen = jax.lax.stop_gradient(x).astype(jnp.float32)
            known = followed(known, jnp.min(seen), jnp.max(seen), layout.decay)
            self.module.put_variable(RANGES, self.name, known)
        rounds = rounds & (known["steps"] > 0)  # before anything entered there is no range
        return jnp.where(rounds, fake_inputs(x, known["low"], known["high"], layout.inputs.bits), x)


def followed(
    known: dict[str, Array], low: Float[Array, ""], high: Float[Array, ""], decay: float
) -> dict[str, Array]:
    """The moving range after one more step, of which the first is taken as it is."""
    keep = jnp.where(known["steps"] == 0, 0.0, decay)
    return {
        "low": keep * known["low"] + (1 - keep) * low,
        "high": keep * known["high"] + (1 - keep) * high,
        "steps": known["steps"] + 1,
    }
