"""An exponential moving average of the parameters."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Ema:
    """`ema <- ema + (1 - d_t) (params - ema)`.

        d_t = decay                               without warm-up
        d_t = min(decay, (1 + t) / (10 + t))      with warm-up

    Without warm-up the initial parameters keep the weight `decay^t`, most of the average in a short run; the
    warm-up (that of TensorFlow's ExponentialMovingAverage) averages over about the last tenth of the run so
    far until `decay` takes over.

    Attributes:
      decay: in [0, 1); 0.9999 is the diffusion models' value.
      warmup: whether the average forgets the initial parameters quickly.
    """

    decay: float = 0.9999
    warmup: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise UsageError(f"decay must lie in [0, 1), not {self.decay}. Leave the section out for no EMA.")

    def init(self, params: Any) -> Any:
        """A copy of the parameters: one buffer of its own, since both are donated to the step."""
        return jax.tree.map(jnp.copy, params)

    def decay_at(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        """`d_t` of the update that follows `step` earlier ones."""
        if not self.warmup:
            return jnp.asarray(self.decay, jnp.float32)
        t = jnp.asarray(step, jnp.float32)
        return jnp.minimum(self.decay, (1 + t) / (10 + t))

    def update(self, ema: Any, params: Any, step: Int[Array, ""] | int) -> Any:
        """The average after `params`; each leaf keeps its dtype, integers take the newest value."""
        rate = 1 - self.decay_at(step)

        def average(old: Array, new: Array) -> Array:
            if not jnp.issubdtype(old.dtype, jnp.inexact):
                return new
            # In float32 also for narrower leaves: (1 - d) (new - old) is far below their resolution.
            wide = jnp.promote_types(old.dtype, jnp.float32)
            old_wide = old.astype(wide)
            return (old_wide + rate.astype(wide) * (new.astype(wide) - old_wide)).astype(old.dtype)

        return jax.tree.map(average, ema, params)
