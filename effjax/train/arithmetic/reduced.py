"""Floats with fewer bits, simulated: operands of products are rounded, sums are those of the run.

    y = r(x) r(W),     dL/dx = r_g(dL/dy) r(W)^T,     dL/dW = r(x)^T r_g(dL/dy)

ExMy has x bits of exponent and y of mantissa. With 8 bits of exponent bits of bfloat16's mantissa are
cleared one by one, E8M7 being bfloat16; with fewer the range shrinks too. Formats of 8 bits are those of
hardware, which scales a tensor so that its largest number is the format's.

    s = max |x| / largest,     r(x) = s round(x / s)

E4M3 is that of 8-bit hardware: no infinities, 448 the largest number. Rounding itself has the gradient of
identity.

Lee, Bae, Kim, Kwon and Lee 2024, arXiv:2405.18710; formats of 8 bits: Micikevicius et al. 2022,
arXiv:2209.05433.
"""

import dataclasses
import functools
import re
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.errors import UsageError
from effjax.train.arithmetic.products import Arithmetic, Axes, straight_through


@dataclasses.dataclass(frozen=True)
class Format:
    """A format of floats, with gradual underflow.

    Attributes:
      exponent: bits of the exponent, 2 to 8; with 8 the range is bfloat16's.
      mantissa: bits behind the leading one, 1 to 7.
    """

    exponent: int
    mantissa: int

    @classmethod
    def of(cls, name: str) -> "Format":
        """`e4m3`, `e8m5`, ...

        Raises:
          UsageError: for any other name.
        """
        found = re.fullmatch(r"e([2-8])m([1-7])", name)
        if found is None:
            raise UsageError(f"{name!r} is no format: say e8m5 or e4m3, with e2 to e8 and m1 to m7.")
        return cls(int(found[1]), int(found[2]))

    @property
    def scaled(self) -> bool:
        """Whether tensors are scaled into the range: in formats of 8 bits."""
        return 1 + self.exponent + self.mantissa <= 8

    @property
    def lowest(self) -> int:
        """Exponent of the smallest normal number."""
        return 2 - 2 ** (self.exponent - 1)

    @property
    def largest(self) -> float:
        """The largest finite number."""
        if (self.exponent, self.mantissa) == (4, 3):
            return 448.0  # the exponent of all ones is no infinity, and only its last number is not one
        return float(2.0 ** (1 - self.lowest) * (2 - 2.0**-self.mantissa))

    def round(self, x: Float[Array, "..."], masked: bool = False) -> Float[Array, "..."]:
        """The nearest number of the format, the even one of two; what is too large becomes the largest.

        Args:
          x: float32, or what float32 holds.
          masked: whether bits are cut off instead, towards zero.
        """
        wide = x.astype(jnp.float32)
        y = self._mantissa(wide, masked) if self.exponent == 8 else self._narrow(wide, masked)
        # bfloat16 holds every number of these formats.
        return jnp.where(jnp.isfinite(wide), y, wide).astype(x.dtype)

    def _mantissa(self, x: Float[Array, "..."], masked: bool) -> Float[Array, "..."]:
        """Fewer bits of mantissa alone, by the bits of float32; a carry runs into the exponent as it must."""
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
        cut = 23 - self.mantissa
        if not masked:
            bits = bits + jnp.uint32(2 ** (cut - 1) - 1) + ((bits >> cut) & 1)
        return jax.lax.bitcast_convert_type((bits >> cut) << cut, jnp.float32)

    def _narrow(self, x: Float[Array, "..."], masked: bool) -> Float[Array, "..."]:
        """Multiples of the last place of each number, which below the smallest normal one no longer falls."""
        exponent = jnp.maximum(jnp.frexp(x)[1] - 1, self.lowest)
        # A power of two by its bits: nobody promises that exp2 is exact.
        last = jax.lax.bitcast_convert_type((exponent - self.mantissa + 127) << 23, jnp.float32)
        y = (jnp.trunc if masked else jnp.round)(x / last) * last
        return jnp.clip(y, -self.largest, self.largest)


@dataclasses.dataclass(frozen=True)
class Reduced(Arithmetic):
    """Operands of products are rounded to a format.

    Attributes:
      operands: the format of what enters, and of weights: `e8m3`.
      gradients: the format of gradients; None leaves them.
      rounding: how bits of mantissa go in formats of more than 8 bits: `masked` cuts them off.
    """

    operands: str = "e8m3"
    gradients: str | None = None
    rounding: Literal["masked", "nearest"] = "masked"

    def __post_init__(self) -> None:
        for name in (self.operands, self.gradients):
            if name is not None:
                Format.of(name)

    def product(
        self, x: Float[Array, "..."], kernel: Float[Array, "..."], contracted: tuple[Axes, Axes]
    ) -> Float[Array, "..."]:
        """Sums over pairs of axes of rounded operands."""
        x, kernel = (self.rounded(operand, ()) for operand in (x, kernel))
        y = jax.lax.dot_general(x, kernel, (contracted, ((), ())))
        return y if self.gradients is None else _rounds_its_gradient(y, self)

    def rounded(self, x: Float[Array, "..."], summed: Axes) -> Float[Array, "..."]:
        """The operand in the format; one scale serves the tensor."""
        del summed
        return straight_through(x, self.in_format(jax.lax.stop_gradient(x), self.operands))

    def in_format(self, x: Float[Array, "..."], name: str) -> Float[Array, "..."]:
        """Numbers of a format, scaled where it has 8 bits."""
        form = Format.of(name)
        if not form.scaled:
            return form.round(x, masked=self.rounding == "masked")
        wide = x.astype(jnp.float32)
        largest = jnp.max(jnp.abs(wide))
        scale = jnp.where(largest > 0, largest / form.largest, 1.0)
        return (form.round(wide / scale) * scale).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _rounds_its_gradient(y: Float[Array, "..."], arithmetic: Reduced) -> Float[Array, "..."]:
    del arithmetic
    return y


def _forward(y: Array, arithmetic: Reduced) -> tuple[Array, None]:
    del arithmetic
    return y, None


def _backward(arithmetic: Reduced, _: None, g: Array) -> tuple[Array]:
    assert arithmetic.gradients is not None
    return (arithmetic.in_format(g, arithmetic.gradients),)


_rounds_its_gradient.defvjp(_forward, _backward)
