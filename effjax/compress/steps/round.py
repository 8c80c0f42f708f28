"""Rounding to the nearest: every kernel in a layout, by its own weights alone.

    min_max        the grid reaches from the smallest to the largest weight of a group
    percentile     from the (1 - p) to the p quantile of them
    mse            of the shares 1, 0.99, .. of the whole range, the one with the least squared error

Krishnamoorthi 2018, arXiv:1806.08342, section 3.1.1; a clipped range by its error as in the calibration of
Banner et al. 2019. A narrower range rounds most weights more finely and cuts the largest off.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.compress.storage import kinds as storage
from effjax.compress.storage.matrices import flat
from effjax.compress.storage.trees import replaced
from effjax.compress.storage.uniform import Uniform
from effjax.compress.subject import Calibration, Subject, chosen, leaf_at
from effjax.config import part
from effjax.errors import UsageError

Range = Literal["min_max", "percentile", "mse"]


@dataclasses.dataclass(frozen=True)
class Round:
    """Stores kernels in a layout.

    Attributes:
      layout: of `effjax.compress.storage`.
      kernels: regexps of whole paths.
      leave: regexps of kernels that stay arrays, whatever `kernels` says.
      range: what the grid of a group reaches over.
      percentile: of `range="percentile"`, in percent.
      shares: of `range="mse"`, how many are tried, from 1 down in steps of 0.01.
    """

    layout: Any = part(storage.KINDS, default=Uniform)
    kernels: tuple[str, ...] = (".*",)
    leave: tuple[str, ...] = ()
    range: Range = "min_max"
    percentile: float = 99.9
    shares: int = 50

    def __post_init__(self) -> None:
        if not 50 < self.percentile <= 100:
            raise UsageError(f"percentile={self.percentile} is not above 50 and at most 100.")
        if not 1 <= self.shares <= 99:
            raise UsageError(f"shares={self.shares} is not from 1 to 99.")
        if self.range != "min_max" and not isinstance(self.layout, Uniform):
            raise UsageError(f"range={self.range!r} is for uniform layouts.")

    def apply(self, subject: Subject, calibration: Calibration) -> Subject:
        """Rounds.

        Raises:
          UsageError: for a pattern that matches no kernel, or a group that does not divide one.
        """
        made = {}
        for path, place in chosen(subject, self.kernels, self.leave).items():
            self.layout.groups(place.matrix[0], path)
            matrix = flat(jnp.asarray(leaf_at(subject.params, path)), place)
            if self.range == "min_max":
                made[path] = jax.jit(self.layout.store, static_argnums=1)(
                    leaf_at(subject.params, path), place
                )
                continue
            scale, zero = fitted(matrix, self.layout, self.range, self.percentile, self.shares)
            made[path] = self.layout.encode(matrix, place, scale, zero)
        calibration.report(f"{len(made)} kernels rounded.")
        return subject.with_params(replaced(subject.params, made))


def fitted(
    matrix: Float[Array, "*front k n"],
    layout: Uniform,
    how: Range,
    percentile: float = 99.9,
    shares: int = 50,
) -> tuple[Float[Array, "*front g n2"], Float[Array, "*front g n2"]]:
    """Scales and zeros of every group.

    Args:
      matrix: the weights.
      layout: of the codes.
      how: what a grid reaches over.
      percentile: of "percentile".
      shares: of "mse".
    """
    matrix = matrix.astype(jnp.float32)
    parts, axes = layout.parted(matrix)
    if how == "min_max":
        return layout.fit(matrix)
    if how == "percentile":
        ends = jnp.asarray([100 - percentile, percentile])
        low, high = jnp.percentile(parts, ends, axis=axes)
        return layout.grid(low, high)
    low, high = jnp.min(parts, axes), jnp.max(parts, axes)

    def try_share(best: Any, share: Float[Array, ""]) -> tuple[Any, None]:
        scale, zero = layout.grid(low * share, high * share)
        codes = layout.codes(matrix, scale, zero)
        grid = codes.reshape(*codes.shape[:-2], scale.shape[-2], -1, codes.shape[-1]) - zero[..., None, :]
        error = layout.parted((grid * scale[..., None, :]).reshape(matrix.shape) - matrix)[0]
        error = jnp.sum(jnp.square(error), axes)
        better = error < best[0]
        new = error, scale, zero
        return jax.tree.map(lambda n, o: jnp.where(better, n, o), new, best), None

    scale, zero = layout.grid(low, high)
    start = jnp.full(low.shape, jnp.inf), scale, zero
    (_, scale, zero), _ = jax.lax.scan(try_share, start, 1 - 0.01 * jnp.arange(shares))
    return scale, zero
