"""What enters a kernel on a grid of its own: integers times integers.

    a = clip( round(x / s_a) + z_a ),    x ~ s_a (a - z_a)                          `bits` bits a code
    y[r, n] = s_a sum_g s[g, n] sum_{k in g} (a[r, k] - z_a) (c[k, n] - z[g, n])

The inner sum is one of integers, and is taken apart so that codes multiply as they are stored:

    sum (a - z_a)(c - z)  =  sum a c  -  z sum a  -  z_a sum c  +  |g| z_a z

Jacob et al. 2018, arXiv:1712.05877, section 2.3; Krishnamoorthi 2018, arXiv:1806.08342, section 2.

    token      symmetric, a scale for every row, from what stands in it
    tensor     symmetric, one scale for all rows that enter at once
    static     affine, one range found beforehand: `effjax.compress.steps.inputs`

Sums are int32, and exact while a group holds at most 2^31 / 255^2 = 33,025 weights.

Time on a CPU of 2 cores that were not idle (jax 0.10.1, packed weights, a scale for every output and row):
1024 rows through 1024 x 1024 take 6.9 to 8.0 ms where the float32 product takes 18 to 22. A single row takes
60 times as long in int8: few rows are rounded and multiplied as floats.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8, UInt8

from effjax.errors import UsageError

Grid = tuple[Float[Array, "..."], Float[Array, "..."]]

# Weights of 8 bits whose products with 8 bits an int32 holds the sum of.
LONGEST = 2**31 // 255**2


@flax.struct.dataclass
class Range:
    """Ends of a grid of what enters.

    Attributes:
      low: `[*front]`.
      high: `[*front]`.
    """

    low: Any
    high: Any


@dataclasses.dataclass(frozen=True)
class Inputs:
    """How what enters a kernel is rounded.

    Attributes:
      bits: of a code, 2 to 8.
    """

    bits: int = 8

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise UsageError(f"inputs of bits={self.bits}: give 2 to 8.")

    def unknown(self, front: tuple[int, ...], rows: int) -> Any:
        """What is to be found out before, for kernels of so many inputs, as NaN; None where nothing is."""
        del front, rows
        return None

    def names(self, front: tuple[str | None, ...]) -> Any:
        """Names of the axes of `unknown`."""
        del front
        return None

    def grid(self, x: Float[Array, "*batch k"], known: Any) -> Grid:
        """Scale and signed zero, in float32, that broadcast against `x`."""
        raise NotImplementedError

    @property
    def integers(self) -> bool:
        """Whether codes of one row share scale and zero, so that a sum of them is one of integers."""
        return True

    def codes(
        self, x: Float[Array, "*batch k"], known: Any
    ) -> tuple[Float[Array, "*batch k"], Float[Array, "..."], Float[Array, "..."]]:
        """Signed codes as floats, their scale and their zero."""
        scale, zero = self.grid(x, known)
        codes = jnp.round(x.astype(jnp.float32) / scale) + zero
        return jnp.clip(codes, -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1), scale, zero

    def rounded(self, x: Float[Array, "*batch k"], known: Any) -> Float[Array, "*batch k"]:
        """What the codes stand for, in the dtype of `x`.

        Args:
          x: what enters; channels are last.
          known: what was found out before, as `unknown` with numbers.
        """
        codes, scale, zero = self.codes(x, known)
        return ((codes - zero) * scale).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Token(Inputs):
    """Symmetric, a scale for every row."""

    def grid(self, x: Float[Array, "*batch k"], known: Any) -> Grid:
        """See the base."""
        return symmetric_grid(jnp.max(jnp.abs(x), -1, keepdims=True), self.bits)


@dataclasses.dataclass(frozen=True)
class Tensor(Inputs):
    """Symmetric, one scale for all that enters at once."""

    def grid(self, x: Float[Array, "*batch k"], known: Any) -> Grid:
        """See the base."""
        return symmetric_grid(jnp.max(jnp.abs(x)).reshape((1,) * x.ndim), self.bits)


@dataclasses.dataclass(frozen=True)
class Static(Inputs):
    """Affine, with a range that is known beforehand."""

    def unknown(self, front: tuple[int, ...], rows: int) -> Range:
        """See the base."""
        del rows
        return Range(jnp.full(front, jnp.nan), jnp.full(front, jnp.nan))

    def names(self, front: tuple[str | None, ...]) -> Range:
        """See the base."""
        return Range(front, front)

    def grid(self, x: Float[Array, "*batch k"], known: Any) -> Grid:
        """See the base."""
        scale, zero = affine_grid(known.low, known.high, self.bits)
        return scale.reshape((1,) * x.ndim), zero.reshape((1,) * x.ndim)


def symmetric_grid(
    largest: Float[Array, "*shape"], bits: int
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """Scale and zero of a grid from -largest to largest."""
    scale = largest.astype(jnp.float32) / (2 ** (bits - 1) - 1)
    return jnp.where(scale == 0, 1.0, scale), jnp.zeros_like(scale)


def affine_grid(
    low: Float[Array, "*shape"], high: Float[Array, "*shape"], bits: int
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """Scale and signed zero of a grid from low to high, on which 0 lies."""
    low, high = jnp.minimum(low.astype(jnp.float32), 0.0), jnp.maximum(high.astype(jnp.float32), 0.0)
    scale = (high - low) / (2**bits - 1)
    scale = jnp.where(scale == 0, 1.0, scale)
    return scale, jnp.clip(jnp.round(-low / scale), 0, 2**bits - 1) - 2 ** (bits - 1)


def integer_product(
    a: Int8[Array, "r k"],
    a_zero: Int[Array, "#r 1"],
    codes: UInt8[Array, "k n"],
    zero: Int[Array, "g n"],
    bits: int,
) -> Int[Array, "g r n"]:
    """sum_{k in g} (a[r, k] - z_a[r]) (c[k, n] - z[g, n]), exactly.

    Args:
      a: signed codes of what enters.
      a_zero: the code that stands for 0 in every row.
      codes: of the weights.
      zero: the code that stands for 0 in every group.
      bits: of a weight's code.
    """
    half, groups, rows = 2 ** (bits - 1), zero.shape[0], a.shape[0]
    w = (codes.astype(jnp.int32) - half).astype(jnp.int8)  # [K, N]
    zero = zero.astype(jnp.int32) - half  # [G, N]
    size = w.shape[0] // groups
    if groups == 1:  # a plain product, for which backends have a fast one
        dot = jax.lax.dot_general(a, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)[None]
    else:
        dot = jax.lax.dot_general(
            a.reshape(rows, groups, size),
            w.reshape(groups, size, -1),
            (((2,), (1,)), ((1,), (0,))),
            preferred_element_type=jnp.int32,
        )  # [G, R, N]
    of_a = jnp.sum(a.reshape(rows, groups, size), -1, dtype=jnp.int32).T  # [G, R]
    of_w = jnp.sum(w.reshape(groups, size, -1), 1, dtype=jnp.int32)  # [G, N]
    rest = of_w - size * zero  # [G, N]
    return dot - of_a[:, :, None] * zero[:, None] - a_zero.astype(jnp.int32)[None] * rest[:, None]


def check_length(rows: int, groups: int) -> None:
    """Refuses sums that an int32 does not hold.

    Raises:
      UsageError: for groups of more than `LONGEST` weights.
    """
    if rows // groups > LONGEST:
        raise UsageError(
            f"a group of {rows // groups} weights times codes of 8 bits does not fit in 32 bits: take a "
            f"group of at most {LONGEST}."
        )
