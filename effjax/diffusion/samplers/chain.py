"""Samplers of discrete chains.

    ddpm    x' = x0_weight x0 + x_weight x + sigma z                              Ho et al. 2020, algorithm 2
    ddim    x' = sqrt(a') x0 + sqrt(1 - a' - sigma^2) eps + sigma z                   Song et al. 2021, eq. 12
            sigma = eta sqrt((1 - a') / (1 - a)) sqrt(1 - a / a')

`x0` and `eps` are the network's prediction read as picture and noise, `a` is alpha_bar, a prime marks the
next step, `z` is fresh noise. Both take some of the schedule's steps (Nichol and Dhariwal 2021, section 4).
"""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from effjax.diffusion.ddpm import DDPM
from effjax.diffusion.examples import example_noise
from effjax.diffusion.process import Process
from effjax.diffusion.samplers.state import Denoise, Plan, State, discrete, estimate
from effjax.diffusion.schedules import posterior, spaced


@dataclasses.dataclass(frozen=True)
class DDPMSampler:
    """Ancestral sampling, with the process's learned or fixed variances.

    Attributes:
      steps: steps to take, of those the schedule has.
      clip: bound on the values of the estimated picture at every step; None leaves them alone. 1 suits
        pictures in [-1, 1], None suits latents.
    """

    remembered: ClassVar[int] = 0
    evaluations: ClassVar[int] = 1

    steps: int = 250
    clip: float | None = None

    def plan(self, process: Process) -> Plan:
        """Posteriors of the shortened chain, noisiest step first."""
        process = discrete(process, "ddpm")
        times = spaced(process.steps, self.steps)
        chain = posterior(process.alpha_bar()[times[::-1]])
        return {"t": times, **{name: table[::-1] for name, table in chain._asdict().items()}}

    def step(self, denoise: Denoise, process: DDPM, state: State, at: Any, keys: Key[Array, " b"]) -> State:
        """Draws x_{t-1}; the last step returns its mean."""
        x0, _, share, memory = estimate(denoise, process, state, at["t"], self.clip)
        log_variance = process.log_variance(share, at)
        mean = at["x0_weight"] * x0 + at["x_weight"] * state.x
        z = example_noise(keys, at["index"], state.x.shape[1:])
        x = mean + jnp.where(at["index"] == self.steps, 0.0, jnp.exp(0.5 * log_variance)) * z
        return State(x, x0, state.earlier, memory)


@dataclasses.dataclass(frozen=True)
class DDIMSampler:
    """Sampling that is deterministic at `eta = 0` and ancestral, with the small variance, at `eta = 1`.

    Attributes:
      steps: steps to take, of those the schedule has.
      eta: share of the ancestral noise.
      clip: bound on the values of the estimated picture at every step; None leaves them alone.
    """

    remembered: ClassVar[int] = 0
    evaluations: ClassVar[int] = 1

    steps: int = 50
    eta: float = 0.0
    clip: float | None = None

    def plan(self, process: Process) -> Plan:
        """Weights of picture, noise and fresh noise, noisiest step first."""
        process = discrete(process, "ddim")
        times = spaced(process.steps, self.steps)
        a = process.alpha_bar()[times]
        after = np.append(a[1:], 1.0)
        sigma = self.eta * np.sqrt((1 - after) / (1 - a)) * np.sqrt(1 - a / after)
        return {
            "t": times,
            "x0_weight": np.sqrt(after),
            # At eta = 1 the root's argument may fall below 0 by rounding.
            "eps_weight": np.sqrt(np.maximum(1 - after - sigma**2, 0.0)),
            "noise_weight": sigma,
        }

    def step(self, denoise: Denoise, process: DDPM, state: State, at: Any, keys: Key[Array, " b"]) -> State:
        """Moves the estimate to the next noise level."""
        x0, eps, _, memory = estimate(denoise, process, state, at["t"], self.clip)
        x = at["x0_weight"] * x0 + at["eps_weight"] * eps
        if self.eta:
            x = x + at["noise_weight"] * example_noise(keys, at["index"], state.x.shape[1:])
        return State(x, x0, state.earlier, memory)
