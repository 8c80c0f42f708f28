"""Discrete diffusion: the noise process of DDPM and what a network learns about it.

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps,   eps ~ N(0, I),   t = 0 .. steps - 1
    target = eps | x_0 | v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0
    L_simple = mean (prediction - target)^2
    L_vlb = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)),  at t = 0  -log p(x_0 | x_1)
    L = L_simple + lambda steps L_vlb

Time index 0 is the first noisy picture, as in the code that all of these papers share. With learned variances
the network gives a share f for each value, in [-1, 1] by habit and not by force, and
log variance = (f + 1)/2 log beta_t + (1 - f)/2 log posterior_variance_t.

Sources: Ho et al., "Denoising Diffusion Probabilistic Models", 2020; Nichol and Dhariwal, "Improved Denoising
Diffusion Probabilistic Models", 2021 (cosine schedule, learned variances, eqs. 14 to 16); Salimans and Ho,
"Progressive Distillation", 2022 (v).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from effjax.diffusion.examples import look_up, mean_of_each
from effjax.diffusion.schedules import alpha_bars, posterior
from effjax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class DDPM:
    """A Gaussian chain of `steps` steps.

    Attributes:
      schedule: how the noise grows.
      steps: length of the chain.
      prediction: what the network predicts.
      sigma: variance of a step back: learned between its bounds, or fixed at the large or small bound.
      vlb_weight: lambda of the variational term, used where sigma is learned; with 0.001 and 1000 steps the
        term has weight 1, as in DiT.
    """

    schedule: Literal["linear", "cosine"] = "linear"
    steps: int = 1000
    prediction: Literal["epsilon", "x0", "v"] = "epsilon"
    sigma: Literal["learned", "large", "small"] = "learned"
    vlb_weight: float = 0.001

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise UsageError(f"steps={self.steps}: a chain needs at least 2 steps.")
        self.alpha_bar()  # refuses a schedule that cannot be cut into so few steps

    @property
    def learned_sigma(self) -> bool:
        """Whether the network gives variances, in a second half of its channels."""
        return self.sigma == "learned"

    @property
    def latest(self) -> float:
        """The noisiest time."""
        return self.steps - 1.0

    def alpha_bar(self) -> Float[np.ndarray, " steps"]:
        """The share of the picture's variance left at each time."""
        return alpha_bars(self.schedule, self.steps)

    def times(self, uniform: Float[Array, " b"]) -> Int[Array, " b"]:
        """Training times from uniform numbers in [0, 1)."""
        return jnp.minimum(jnp.floor(uniform * self.steps), self.steps - 1).astype(jnp.int32)

    def network_time(self, t: Int[Array, " b"]) -> Float[Array, " b"]:
        """What the network is told: the index itself."""
        return t.astype(jnp.float32)

    def noise(
        self, x0: Float[Array, "b *rest"], eps: Float[Array, "b *rest"], t: Int[Array, " b"]
    ) -> Float[Array, "b *rest"]:
        """Returns x_t, a sample of q(x_t | x_0)."""
        signal, noise = self._rates(t, x0)
        return signal * x0 + noise * eps

    def target(
        self, x0: Float[Array, "b *rest"], eps: Float[Array, "b *rest"], t: Int[Array, " b"]
    ) -> Float[Array, "b *rest"]:
        """What the network should predict."""
        if self.prediction == "epsilon":
            return eps
        if self.prediction == "x0":
            return x0
        signal, noise = self._rates(t, x0)
        return signal * eps - noise * x0

    def to_x0_eps(
        self, mean: Float[Array, "b *rest"], x_t: Float[Array, "b *rest"], t: Int[Array, " b"]
    ) -> tuple[Float[Array, "b *rest"], Float[Array, "b *rest"]]:
        """Reads a prediction (without its variance half) as a clean picture and as noise."""
        signal, noise = self._rates(t, x_t)
        if self.prediction == "epsilon":
            return (x_t - noise * mean) / signal, mean
        if self.prediction == "x0":
            return mean, self.to_eps(mean, x_t, t)
        return signal * x_t - noise * mean, noise * x_t + signal * mean

    def to_eps(
        self, x0: Float[Array, "b *rest"], x_t: Float[Array, "b *rest"], t: Int[Array, " b"]
    ) -> Float[Array, "b *rest"]:
        """The noise that leads from `x0` to `x_t`."""
        signal, noise = self._rates(t, x_t)
        return (x_t - signal * x0) / noise

    def split(
        self, prediction: Float[Array, "b *rest out"], channels: int
    ) -> tuple[Float[Array, "b *rest channels"], Float[Array, "b *rest channels"] | None]:
        """Cuts a prediction into its mean and, where it is learned, its share of the variance."""
        if not self.learned_sigma:
            return prediction, None
        return prediction[..., :channels], prediction[..., channels:]

    def log_variance(
        self,
        share: Float[Array, "b *rest"] | None,
        at: Mapping[str, Array],
    ) -> Float[Array, "*out"]:
        """Log variance of a step back; `at` has the fields of `Posterior` at that step."""
        if share is None:
            return at["log_small"] if self.sigma == "small" else at["log_fixed_large"]
        return (share + 1) / 2 * at["log_large"] + (1 - share) / 2 * at["log_small"]

    def loss(
        self,
        prediction: Float[Array, "b *rest out"],
        x0: Float[Array, "b *rest c"],
        eps: Float[Array, "b *rest c"],
        t: Int[Array, " b"],
        noised: Bool[Array, "b *some"] | None = None,
    ) -> dict[str, Float[Array, " b"]]:
        """Losses of each example: `loss`, `mse` and, where sigma is learned, `vlb` in bits a dimension.

        The variational term trains the variances alone: the mean in it is held fixed. Where `noised` says
        which parts are, the others do not count.
        """
        mean, share = self.split(prediction, x0.shape[-1])
        mse = mean_of_each((mean - self.target(x0, eps, t)) ** 2, noised)  # [B]
        if share is None:
            return {"loss": mse, "mse": mse}
        vlb = self.vlb(jax.lax.stop_gradient(mean), share, x0, self.noise(x0, eps, t), t, noised)  # [B]
        return {"loss": mse + self.vlb_weight * self.steps * vlb, "mse": mse, "vlb": vlb}

    def vlb(
        self,
        mean: Float[Array, "b *rest"],
        share: Float[Array, "b *rest"] | None,
        x0: Float[Array, "b *rest"],
        x_t: Float[Array, "b *rest"],
        t: Int[Array, " b"],
        noised: Bool[Array, "b *some"] | None = None,
    ) -> Float[Array, " b"]:
        """The term of the variational bound at time `t`, in bits a dimension.

        At t = 0 it is the likelihood of `x0` in bins of 1/127.5 between -1 and 1, which is meant for 8-bit
        pictures; the official code applies it to latents as well.
        """
        chain = posterior(self.alpha_bar())._asdict()
        at = {name: look_up(table, t, x0) for name, table in chain.items()}
        estimate, _ = self.to_x0_eps(mean, x_t, t)
        log_variance = self.log_variance(share, at)
        # Both means share x_weight x_t, so only the clean pictures differ.
        difference = at["x0_weight"] * (x0 - estimate)
        ratio = at["log_small"] - log_variance
        kl = 0.5 * (jnp.exp(ratio) - 1.0 - ratio + difference**2 * jnp.exp(-log_variance))
        decoder = -_log_bin(x0, estimate, jnp.exp(0.5 * log_variance))  # at t = 0 the mean is the estimate
        nats = jnp.where(t == 0, mean_of_each(decoder, noised), mean_of_each(kl, noised))  # [B]
        return nats / math.log(2.0)

    def _rates(
        self, t: Int[Array, " b"], like: Float[Array, "b *rest"]
    ) -> tuple[Float[Array, "b *ones"], Float[Array, "b *ones"]]:
        """Rates of picture and noise in x_t: sqrt(alpha_bar), sqrt(1 - alpha_bar)."""
        alpha_bar = self.alpha_bar()
        return look_up(np.sqrt(alpha_bar), t, like), look_up(np.sqrt(1.0 - alpha_bar), t, like)


def _log_bin(
    x: Float[Array, "*shape"], mean: Float[Array, "*shape"], deviation: Float[Array, "*any"]
) -> Float[Array, "*shape"]:
    """Log probability that a normal gives to the 8-bit bin around `x`; the outermost bins are open.

    Source: Ho et al. 2020, eq. 13.
    """
    upper = jax.scipy.special.ndtr((x - mean + 1 / 255) / deviation)
    lower = jax.scipy.special.ndtr((x - mean - 1 / 255) / deviation)
    upper = jnp.where(x > 0.999, 1.0, upper)
    lower = jnp.where(x < -0.999, 0.0, lower)
    return jnp.log(jnp.maximum(upper - lower, 1e-12))
