"""Noise schedules of discrete diffusion and the posterior of one step, in float64 NumPy.

    alpha_bar_t = prod_{s <= t} (1 - beta_s)                                        Ho et al. 2020, eq. 4
    q(x_{t-1} | x_t, x_0) = N(x0_weight_t x_0 + x_weight_t x_t, variance_t I)       ibid., eqs. 6 and 7
    x0_weight_t = sqrt(alpha_bar_{t-1}) beta_t / (1 - alpha_bar_t)
    x_weight_t = sqrt(1 - beta_t) (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t)
    variance_t = beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t)

`1 - alpha_bar` near t = 0 is about 1e-4 and differences of neighbours smaller still: float32 would keep three
digits of them. So tables are made in float64 and rounded once, where they are used.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from effjax.errors import UsageError


def linear_betas(steps: int) -> Float[np.ndarray, " steps"]:
    """From 1e-4 to 0.02 over 1000 steps, scaled by 1000 / steps otherwise (Ho et al. 2020, section 4)."""
    scale = 1000.0 / steps
    if scale * 0.02 >= 1.0:
        raise UsageError(
            f"the linear schedule with steps={steps} has a beta of {scale * 0.02:g}, and 1 is already all "
            f"noise: set steps to 21 or more, or schedule='cosine'."
        )
    return np.linspace(scale * 1e-4, scale * 0.02, steps, dtype=np.float64)


def cosine_betas(steps: int, offset: float = 0.008, cap: float = 0.999) -> Float[np.ndarray, " steps"]:
    """alpha_bar falls as a squared cosine (Nichol and Dhariwal 2021, eq. 17); the last betas are capped."""
    time = np.arange(steps + 1, dtype=np.float64) / steps
    alpha_bar = np.cos((time + offset) / (1 + offset) * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], cap)


BETAS = {"linear": linear_betas, "cosine": cosine_betas}


def alpha_bars(schedule: str, steps: int) -> Float[np.ndarray, " steps"]:
    """The share of the picture's variance left after each step."""
    return np.cumprod(1.0 - BETAS[schedule](steps))


def spaced(available: int, wanted: int) -> Int[np.ndarray, " wanted"]:
    """`wanted` of the time indices `0 .. available - 1`, evenly spaced, first and last among them, falling.

    One step alone is the noisiest. The spacing is that of improved DDPM's `timestep_respacing`.

    Raises:
      UsageError: where `wanted` is below 1 or above `available`.
    """
    if not 1 <= wanted <= available:
        raise UsageError(
            f"steps={wanted} cannot be sampled: the schedule has {available} steps, so take between 1 and "
            f"{available}."
        )
    return np.round(np.linspace(available - 1, 0, wanted)).astype(np.int32)


class Posterior(NamedTuple):
    """The Gaussian of one step back, for each step; fields `[steps]`, rising time.

    Attributes:
      x0_weight: what the mean takes of the clean picture.
      x_weight: what the mean takes of the noisy picture.
      log_small: log of the posterior variance, the least a step back can have. At the first step it would
        be log 0 and is that of the second.
      log_large: log of beta, the most it can have.
      log_fixed_large: `log_large`, but `log_small` at the first step, as DDPM samples with fixed variances.
    """

    x0_weight: Float[np.ndarray, " steps"]
    x_weight: Float[np.ndarray, " steps"]
    log_small: Float[np.ndarray, " steps"]
    log_large: Float[np.ndarray, " steps"]
    log_fixed_large: Float[np.ndarray, " steps"]


def posterior(alpha_bar: Float[np.ndarray, " steps"]) -> Posterior:
    """The posterior between neighbouring times of a chain, all of the schedule's or some of them.

    Args:
      alpha_bar: of the chain's times in rising order; before the first lies the clean picture, 1.
    """
    before = np.concatenate([[1.0], alpha_bar[:-1]])
    beta = 1.0 - alpha_bar / before
    variance = beta * (1.0 - before) / (1.0 - alpha_bar)
    # A chain of one step has no second one; nothing is drawn at its only step, so any number would do.
    variance[0] = variance[1] if len(beta) > 1 else beta[0]
    log_small, log_large = np.log(variance), np.log(beta)
    return Posterior(
        x0_weight=np.sqrt(before) * beta / (1.0 - alpha_bar),
        x_weight=np.sqrt(1.0 - beta) * (1.0 - before) / (1.0 - alpha_bar),
        log_small=log_small,
        log_large=log_large,
        log_fixed_large=np.concatenate([log_small[:1], log_large[1:]]),
    )
