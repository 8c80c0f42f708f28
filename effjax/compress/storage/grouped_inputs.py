"""What enters a kernel in groups of like range, each on a grid of its own: outliers keep to themselves.

    a[.., t, k] = clip( round(x[.., t, k] / s_j) + z_j ),     j = member[k]   or   j = member[t]

Channels with outliers, or places with outliers, are groups; members are found beforehand, and need not be
neighbours: `effjax.compress.steps.dgq`. Where channels are grouped the sum over them is taken apart by
groups,

    y[r, n] = sum_j s_j sum_{k: member[k] = j} (a[r, k] - z_j) w[k, n]

of which each inner sum is one of integers: `grouped_product`. It costs as many products as there are groups;
what runs here is the product of the numbers that the codes stand for.

Ryu et al., DGQ, ICLR 2025, arXiv:2501.04304.
"""

import dataclasses
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8, UInt8

from effjax.compress.storage.inputs import Grid, Inputs, affine_grid, integer_product
from effjax.errors import UsageError


@flax.struct.dataclass
class Groups:
    """Ends of the grids of groups, and who belongs to which.

    Attributes:
      low: `[*front, groups]`.
      high: `[*front, groups]`.
      member: `[*front, K]` or `[*front, T]`, the group of every channel or place.
    """

    low: Any
    high: Any
    member: Any


@dataclasses.dataclass(frozen=True)
class Grouped(Inputs):
    """Affine, with a range for every group of channels or of places.

    Attributes:
      axis: what is grouped.
      groups: how many, at most 256.
      places: of a sequence, where they are grouped.
    """

    axis: Literal["channels", "places"] = "channels"
    groups: int = 8
    places: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.groups <= 256:
            raise UsageError(f"groups={self.groups} is not from 1 to 256.")
        if (self.axis == "places") != (self.places > 0):
            raise UsageError(f"axis={self.axis!r} and places={self.places}: give places for that axis alone.")

    @property
    def integers(self) -> bool:
        """See the base."""
        return False

    def unknown(self, front: tuple[int, ...], rows: int) -> Groups:
        """See the base."""
        ends = jnp.full((*front, self.groups), jnp.nan)
        count = self.places if self.axis == "places" else rows
        return Groups(ends, ends, jnp.zeros((*front, count), jnp.uint8))

    def names(self, front: tuple[str | None, ...]) -> Groups:
        """See the base."""
        return Groups(*[(*front, None)] * 3)

    def grid(self, x: Float[Array, "*batch k"], known: Any) -> Grid:
        """See the base.

        Raises:
          UsageError: for as many places as were not calibrated.
        """
        scale, zero = affine_grid(known.low, known.high, self.bits)
        member = known.member.astype(jnp.int32)
        scale, zero = scale[member], zero[member]  # [K] or [T]
        if self.axis == "channels":
            shape = (1,) * (x.ndim - 1) + (-1,)
        else:
            if x.ndim < 2 or x.shape[-2] != self.places:
                raise UsageError(
                    f"inputs of {x.shape} have not the {self.places} places that were calibrated: calibrate "
                    f"at the size of use, or group channels."
                )
            shape = (1,) * (x.ndim - 2) + (-1, 1)
        return scale.reshape(shape), zero.reshape(shape)


def grouped_product(
    a: Int8[Array, "r k"],
    a_zero: Int[Array, " j"],
    member: Int[Array, " k"],
    codes: UInt8[Array, "k n"],
    zero: Int[Array, "g n"],
    bits: int,
) -> Int[Array, "j g r n"]:
    """sum_{k in g, member[k] = j} (a[r, k] - z_j) (c[k, n] - z[g, n]), exactly.

    Args:
      a: signed codes of what enters.
      a_zero: the code that stands for 0 in every group of channels.
      member: the group of every channel.
      codes: of the weights.
      zero: the code that stands for 0 in every group of weights.
      bits: of a weight's code.
    """
    none = jnp.zeros((a.shape[0], 1), jnp.int32)

    def one(group: Int[Array, ""], z: Int[Array, ""]) -> Int[Array, "g r n"]:
        inside = (member == group)[None]  # [1, K]
        of_codes = integer_product(jnp.where(inside, a, 0), none, codes, zero, bits)  # [G, R, N]
        of_zero = integer_product(inside.astype(jnp.int8), none[:1], codes, zero, bits)  # [G, 1, N]
        return of_codes - z * of_zero

    return jax.lax.map(lambda pair: one(*pair), (jnp.arange(len(a_zero)), a_zero.astype(jnp.int32)))
