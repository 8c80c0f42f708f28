"""Rectified flow: straight lines between picture and noise, and the velocity along them.

    x_t = (1 - t) x_0 + t eps,     eps ~ N(0, I),   t in [0, 1]
    target = dx_t / dt = eps - x_0
    L = mean (prediction - target)^2

The convention here: t = 0 is the picture and t = 1 is noise, as time runs in DDPM and in Stable Diffusion 3;
Liu et al. and InstaFlow let time run the other way, with the opposite velocity.

Sources: Liu et al., "Flow Straight and Fast", 2023; Esser et al., "Scaling Rectified Flow Transformers", 2024
(logit-normal times, section 3.1).
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from effjax.diffusion.examples import across, mean_of_each
from effjax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class RectifiedFlow:
    """A straight coupling of pictures and noise.

    Attributes:
      density: how training times are drawn: uniform, or the sigmoid of a normal, which prefers the middle.
      mean: of that normal; above 0 prefers noise.
      deviation: of that normal.
    """

    density: Literal["uniform", "logit_normal"] = "uniform"
    mean: float = 0.0
    deviation: float = 1.0

    learned_sigma: ClassVar[bool] = False
    latest: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        if self.deviation <= 0:
            raise UsageError(f"deviation={self.deviation:g} must be above 0.")

    def times(self, uniform: Float[Array, " b"]) -> Float[Array, " b"]:
        """Training times from uniform numbers in [0, 1), by the inverse of their distribution."""
        if self.density == "uniform":
            return uniform
        return jax.nn.sigmoid(self.mean + self.deviation * jax.scipy.special.ndtri(uniform))

    def network_time(self, t: Float[Array, " b"]) -> Float[Array, " b"]:
        """What the network is told: 1000 t, the range its time embedding is made for."""
        return 1000.0 * t.astype(jnp.float32)

    def noise(
        self, x0: Float[Array, "b *rest"], eps: Float[Array, "b *rest"], t: Float[Array, " b"]
    ) -> Float[Array, "b *rest"]:
        """Returns x_t on the line from picture to noise."""
        return (1.0 - across(t, x0)) * x0 + across(t, x0) * eps

    def target(
        self, x0: Float[Array, "b *rest"], eps: Float[Array, "b *rest"], t: Float[Array, " b"]
    ) -> Float[Array, "b *rest"]:
        """The velocity, the same everywhere on a line."""
        return eps - x0

    def to_x0_eps(
        self, mean: Float[Array, "b *rest"], x_t: Float[Array, "b *rest"], t: Float[Array, " b"]
    ) -> tuple[Float[Array, "b *rest"], Float[Array, "b *rest"]]:
        """Reads a velocity as the two ends of its line."""
        return x_t - across(t, x_t) * mean, x_t + (1.0 - across(t, x_t)) * mean

    def to_eps(
        self, x0: Float[Array, "b *rest"], x_t: Float[Array, "b *rest"], t: Float[Array, " b"]
    ) -> Float[Array, "b *rest"]:
        """The noise that leads from `x0` to `x_t`."""
        return (x_t - (1.0 - across(t, x_t)) * x0) / across(t, x_t)

    def split(
        self, prediction: Float[Array, "b *rest out"], channels: int
    ) -> tuple[Float[Array, "b *rest out"], None]:
        """A flow has no variance."""
        return prediction, None

    def loss(
        self,
        prediction: Float[Array, "b *rest"],
        x0: Float[Array, "b *rest"],
        eps: Float[Array, "b *rest"],
        t: Float[Array, " b"],
        noised: Bool[Array, "b *some"] | None = None,
    ) -> dict[str, Float[Array, " b"]]:
        """Losses of each example, where it is noised: `loss` and `mse`, which are the same."""
        mse = mean_of_each((prediction - self.target(x0, eps, t)) ** 2, noised)  # [B]
        return {"loss": mse, "mse": mse}
