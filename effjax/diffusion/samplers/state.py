"""What all samplers share: where they stand, what they are given, and how they read a prediction."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from effjax.diffusion.ddpm import DDPM
from effjax.diffusion.process import Process, kind_of
from effjax.diffusion.rectified_flow import RectifiedFlow
from effjax.errors import UsageError

# (x_t, t, memory) -> (prediction, memory), with the condition bound.
Denoise = Callable[[Array, Array, Any], tuple[Array, Any]]
# What each step needs to know, stacked over steps, noisiest first.
Plan = dict[str, np.ndarray]


@flax.struct.dataclass
class State:
    """Where a sampler stands.

    Attributes:
      x: `[B, *shape]`, the noisy pictures.
      x0: `[B, *shape]`, the last estimate of the clean ones.
      earlier: `[n, B, *shape]`, estimates of the steps before, newest first, as many as the sampler keeps.
      memory: the denoiser's.
    """

    x: Any
    x0: Any
    earlier: Any
    memory: Any


def estimate(
    denoise: Denoise, process: Process, state: State, t: Float[Array, ""] | Array, clip: float | None
) -> tuple[Array, Array, Array | None, Any]:
    """The picture that the network sees in `x`, the noise that fits it, the variance share, the memory."""
    x, times = state.x, everywhere(t, state.x)
    prediction, memory = denoise(x, times, state.memory)
    mean, share = process.split(prediction, x.shape[-1])
    x0, eps = process.to_x0_eps(mean, x, times)
    if clip is not None:
        x0 = jnp.clip(x0, -clip, clip)
        eps = process.to_eps(x0, x, times)
    return x0, eps, share, memory


def everywhere(t: Array, x: Float[Array, "b *shape"]) -> Array:
    """One time for every example, `[B]`."""
    return jnp.full(x.shape[:1], t)


def discrete(process: Process, sampler: str) -> DDPM:
    """The process as a chain of steps.

    Raises:
      UsageError: where it is none.
    """
    if not isinstance(process, DDPM):
        raise UsageError(_misfit(process, sampler, "euler, heun or dpm_solver"))
    return process


def flow(process: Process, sampler: str) -> RectifiedFlow:
    """The process as a flow.

    Raises:
      UsageError: where it is none.
    """
    if not isinstance(process, RectifiedFlow):
        raise UsageError(_misfit(process, sampler, "ddpm, ddim or dpm_solver"))
    return process


def _misfit(process: Process, sampler: str, instead: str) -> str:
    return f"the sampler {sampler!r} does not walk a {kind_of(process)} process: take {instead}."


def even(steps: int) -> np.ndarray:
    """Where `steps` equal steps from noise at 1 to pictures at 0 start, and last where they end.

    Raises:
      UsageError: for fewer than one.
    """
    if steps < 1:
        raise UsageError(f"steps={steps}: a sampler takes at least 1 step.")
    return np.linspace(1.0, 0.0, steps + 1)
