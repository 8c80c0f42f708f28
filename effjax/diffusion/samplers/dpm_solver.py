"""DPM-Solver++: the ODE of the clean picture, solved in the logarithm of signal over noise.

    lambda = log(alpha / sigma),   h = lambda' - lambda,   x_t = alpha x_0 + sigma eps
    x' = (sigma' / sigma) x - alpha' (e^-h - 1) D
    order 1    D = x0                                                 which is DDIM with eta = 0
    order 2    D = x0 + (x0 - x0_1) / (2 r),   r = h_1 / h
    order 3    two divided differences of x0, x0_1, x0_2, each with its own integral of e^-h

`x0` is the network's estimate of the picture, `x0_1`, `x0_2` and `h_1` are those of the steps before, a prime
marks where the step ends. The linear part is exact, so few steps do: ten to twenty. The first steps and the
last are of lower order, for want of steps behind and of a finite lambda ahead.

Source: Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models", 2022,
algorithm 2 and appendix B.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from effjax.diffusion.ddpm import DDPM
from effjax.diffusion.process import Process
from effjax.diffusion.samplers.state import Denoise, Plan, State, estimate, even
from effjax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class DPMSolverSampler:
    """Deterministic multistep sampling of a chain or a flow, one evaluation a step.

    Attributes:
      steps: steps to take, of those the schedule has.
      order: 1, 2 or 3; with guidance 2, which is more stable, without it 3.
      clip: bound on the values of the estimated picture at every step; None leaves them alone.
    """

    steps: int = 20
    order: Literal[1, 2, 3] = 2
    clip: float | None = None

    evaluations: ClassVar[int] = 1

    @property
    def remembered(self) -> int:
        """How many earlier estimates a step reads."""
        return self.order - 1

    def plan(self, process: Process) -> Plan:
        """Weights of `x` and of the last `order` estimates at each step, in float64 until the end."""
        if isinstance(process, DDPM):
            if not 1 <= self.steps <= process.steps - 1:
                raise UsageError(
                    f"steps={self.steps} cannot be sampled: the schedule has {process.steps} steps, so "
                    f"dpm_solver takes between 1 and {process.steps - 1}."
                )
            # The last step ends at the picture itself, not at the least noisy time.
            t = np.round(np.linspace(process.steps - 1, 0, self.steps + 1))[:-1].astype(np.int32)
            alpha_bar = np.append(process.alpha_bar()[t], 1.0)
            alpha, sigma = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
        else:
            edges = even(self.steps)
            t, alpha, sigma = edges[:-1], 1 - edges, edges
        with np.errstate(divide="ignore"):
            rows = [_weights(alpha, sigma, i, self.order) for i in range(self.steps)]
        return {"t": t, "x_weight": sigma[1:] / sigma[:-1], "weights": np.asarray(rows)}

    def step(
        self, denoise: Denoise, process: Process, state: State, at: Any, keys: Key[Array, " b"]
    ) -> State:
        """One step, one evaluation."""
        x0, _, _, memory = estimate(denoise, process, state, at["t"], self.clip)
        estimates = jnp.concatenate([x0[None], state.earlier])  # [order, B, *shape]
        x = at["x_weight"] * state.x + jnp.tensordot(at["weights"], estimates, axes=1)
        return State(x, x0, estimates[: self.remembered], memory)


def _weights(
    alpha: Float[np.ndarray, " edges"], sigma: Float[np.ndarray, " edges"], i: int, order: int
) -> Float[np.ndarray, " order"]:
    """What step `i` takes of the estimates at `i`, `i - 1`, ...: those it does not read have weight 0."""
    steps = len(alpha) - 1
    depth = min(order, i + 1, steps - i)  # 1 where h is infinite, which the first and last step may be
    ratio = sigma[i + 1] * alpha[i] / (alpha[i + 1] * sigma[i])  # e^-h
    first = alpha[i + 1] * (1 - ratio)  # alpha' times the integral of e^-h
    weights = np.zeros(order)
    weights[0] = first
    if depth == 1:
        return weights
    lambdas = np.log(alpha / sigma)
    h, h_1 = lambdas[i + 1] - lambdas[i], lambdas[i] - lambdas[i - 1]
    slope = np.array([1.0, -1.0, 0.0]) * h / h_1  # of the estimates, newest first
    if depth == 2:
        weights += first / 2 * slope[:order]
        return weights
    h_2 = lambdas[i - 1] - lambdas[i - 2]
    earlier = np.array([0.0, 1.0, -1.0]) * h / h_2
    bend = (slope - earlier) * h / (h_1 + h_2)  # half of a second derivative
    slope = slope + (slope - earlier) * h_1 / (h_1 + h_2)
    second = alpha[i + 1] * ((ratio - 1) / h + 1)
    third = alpha[i + 1] * ((ratio - 1 + h) / h**2 - 0.5)
    return weights + second * slope - third * bend
