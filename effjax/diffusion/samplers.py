"""Samplers: from noise to pictures, as one scan over the steps.

    ddpm    x' = x0_weight x0 + x_weight x + sigma z                              Ho et al. 2020, algorithm 2
    ddim    x' = sqrt(a') x0 + sqrt(1 - a' - sigma^2) eps + sigma z                   Song et al. 2021, eq. 12
            sigma = eta sqrt((1 - a') / (1 - a)) sqrt(1 - a / a')
    euler   x' = x + (t' - t) v(x, t)                                                 Liu et al. 2023
    heun    x' = x + (t' - t) (v(x, t) + v(x + (t' - t) v(x, t), t')) / 2

`x0` and `eps` are the network's prediction read as picture and noise, `a` is alpha_bar, a prime marks the
next step, `z` is fresh noise. ddpm and ddim take some of the schedule's steps (Nichol and Dhariwal 2021,
section 4).

A sampler is a frozen dataclass with `plan(process)`, what each step needs to know, stacked over steps, and
`step(denoise, process, state, at, keys)`. The scan itself stands once, below.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from effjax.diffusion.ddpm import DDPM
from effjax.diffusion.examples import example_noise
from effjax.diffusion.guidance import Denoiser
from effjax.diffusion.process import Process, kind_of
from effjax.diffusion.rectified_flow import RectifiedFlow
from effjax.diffusion.schedules import posterior, spaced
from effjax.errors import UsageError

# (x_t, t) -> prediction, with the labels bound.
Denoise = Callable[[Array, Array], Array]
Plan = dict[str, np.ndarray]


@flax.struct.dataclass
class State:
    """Where a sampler stands.

    Attributes:
      x: `[B, *shape]`, the noisy pictures.
      x0: `[B, *shape]`, the last estimate of the clean ones.
    """

    x: Any
    x0: Any


@dataclasses.dataclass(frozen=True)
class DDPMSampler:
    """Ancestral sampling, with the process's learned or fixed variances.

    Attributes:
      steps: steps to take, of those the schedule has.
      clip: bound on the values of the estimated picture at every step; None leaves them alone. 1 suits
        pictures in [-1, 1], None suits latents.
    """

    steps: int = 250
    clip: float | None = None

    def plan(self, process: Process) -> Plan:
        """Posteriors of the shortened chain, noisiest step first."""
        process = _discrete(process, "ddpm")
        times = spaced(process.steps, self.steps)
        chain = posterior(process.alpha_bar()[times[::-1]])
        return {"t": times, **{name: table[::-1] for name, table in chain._asdict().items()}}

    def step(self, denoise: Denoise, process: DDPM, state: State, at: Any, keys: Key[Array, " b"]) -> State:
        """Draws x_{t-1}; the last step returns its mean."""
        estimate, _, share = _estimate(denoise, process, state.x, at["t"], self.clip)
        log_variance = process.log_variance(share, at)
        mean = at["x0_weight"] * estimate + at["x_weight"] * state.x
        z = example_noise(keys, at["index"], state.x.shape[1:])
        x = mean + jnp.where(at["index"] == self.steps, 0.0, jnp.exp(0.5 * log_variance)) * z
        return State(x, estimate)


@dataclasses.dataclass(frozen=True)
class DDIMSampler:
    """Sampling that is deterministic at `eta = 0` and ancestral, with the small variance, at `eta = 1`.

    Attributes:
      steps: steps to take, of those the schedule has.
      eta: share of the ancestral noise.
      clip: bound on the values of the estimated picture at every step; None leaves them alone.
    """

    steps: int = 50
    eta: float = 0.0
    clip: float | None = None

    def plan(self, process: Process) -> Plan:
        """Weights of picture, noise and fresh noise, noisiest step first."""
        process = _discrete(process, "ddim")
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
        estimate, eps, _ = _estimate(denoise, process, state.x, at["t"], self.clip)
        x = at["x0_weight"] * estimate + at["eps_weight"] * eps
        if self.eta:
            x = x + at["noise_weight"] * example_noise(keys, at["index"], state.x.shape[1:])
        return State(x, estimate)


@dataclasses.dataclass(frozen=True)
class EulerSampler:
    """Straight steps along the velocity of a rectified flow, from t = 1 to t = 0.

    Attributes:
      steps: equal steps, one evaluation each.
    """

    steps: int = 50

    def plan(self, process: Process) -> Plan:
        """Where each step starts and ends."""
        return _even(_flow(process, "euler"), self.steps)

    def step(
        self, denoise: Denoise, process: RectifiedFlow, state: State, at: Any, keys: Key[Array, " b"]
    ) -> State:
        """One step, one evaluation."""
        v = denoise(state.x, _full(at["t"], state.x))
        return State(state.x + (at["after"] - at["t"]) * v, state.x - at["t"] * v)


@dataclasses.dataclass(frozen=True)
class HeunSampler:
    """Euler's step corrected by the velocity where it arrives: second order.

    Attributes:
      steps: equal steps, two evaluations each.
    """

    steps: int = 25

    def plan(self, process: Process) -> Plan:
        """Where each step starts and ends."""
        return _even(_flow(process, "heun"), self.steps)

    def step(
        self, denoise: Denoise, process: RectifiedFlow, state: State, at: Any, keys: Key[Array, " b"]
    ) -> State:
        """One step, two evaluations."""
        move = at["after"] - at["t"]
        v = denoise(state.x, _full(at["t"], state.x))
        v = 0.5 * (v + denoise(state.x + move * v, _full(at["after"], state.x)))
        return State(state.x + move * v, state.x - at["t"] * v)


Sampler = DDPMSampler | DDIMSampler | EulerSampler | HeunSampler

KINDS = {"ddpm": DDPMSampler, "ddim": DDIMSampler, "euler": EulerSampler, "heun": HeunSampler}


def sample(
    sampler: Sampler,
    denoiser: Denoiser,
    process: Process,
    label: Int[Array, " b"],
    shape: Sequence[int],
    keys: Key[Array, " b"],
) -> Float[Array, "b *shape"]:
    """Draws one picture for each label.

    Args:
      sampler: how to walk.
      denoiser: `(x_t, t, label) -> prediction`, guided or not.
      process: what the denoiser was trained on.
      label: the class of each picture.
      shape: of one picture.
      keys: one for each picture (`effjax.diffusion.examples.example_keys`): all of its noise.

    Raises:
      UsageError: where the sampler does not fit the process, or takes more steps than the schedule has.
    """
    state, _ = _walk(sampler, denoiser, process, label, shape, keys, lambda state: None)
    return state.x


def trajectory(
    sampler: Sampler,
    denoiser: Denoiser,
    process: Process,
    label: Int[Array, " b"],
    shape: Sequence[int],
    keys: Key[Array, " b"],
) -> Float[Array, "steps b *shape"]:
    """Like `sample`, but returns the estimate of the clean pictures at every step."""
    return _walk(sampler, denoiser, process, label, shape, keys, lambda state: state.x0)[1]


def _walk(
    sampler: Sampler,
    denoiser: Denoiser,
    process: Process,
    label: Int[Array, " b"],
    shape: Sequence[int],
    keys: Key[Array, " b"],
    keep: Callable[[State], Any],
) -> tuple[State, Any]:
    """The scan over steps; `keep` chooses what is stacked."""
    plan: dict[str, Array] = {name: _narrow(table) for name, table in sampler.plan(process).items()}
    plan["index"] = jnp.arange(1, sampler.steps + 1)

    def denoise(x: Array, t: Array) -> Array:
        return denoiser(x, t, label)

    def step(state: State, at: Any) -> tuple[State, Any]:
        state = sampler.step(denoise, process, state, at, keys)  # type: ignore[arg-type]
        return state, keep(state)

    x = example_noise(keys, 0, shape)  # the same start for every sampler and number of steps
    return jax.lax.scan(step, State(x, jnp.zeros_like(x)), plan)


def _estimate(
    denoise: Denoise, process: DDPM, x: Float[Array, "b *shape"], t: Int[Array, ""], clip: float | None
) -> tuple[Float[Array, "b *shape"], Float[Array, "b *shape"], Float[Array, "b *shape"] | None]:
    """The picture, the noise that fits it, and the variance share that the network sees in `x`."""
    times = _full(t, x)
    mean, share = process.split(denoise(x, times), x.shape[-1])
    x0, eps = process.to_x0_eps(mean, x, times)
    if clip is not None:
        x0 = jnp.clip(x0, -clip, clip)
        eps = process.to_eps(x0, x, times)
    return x0, eps, share


def _narrow(table: np.ndarray) -> Array:
    return jnp.asarray(table, jnp.int32 if table.dtype.kind == "i" else jnp.float32)


def _full(t: Array, x: Float[Array, "b *shape"]) -> Array:
    return jnp.full(x.shape[:1], t)


def _even(process: RectifiedFlow, steps: int) -> Plan:
    if steps < 1:
        raise UsageError(f"steps={steps}: a sampler takes at least 1 step.")
    t = np.linspace(1.0, 0.0, steps + 1)
    return {"t": t[:-1], "after": t[1:]}


def _discrete(process: Process, sampler: str) -> DDPM:
    if not isinstance(process, DDPM):
        raise UsageError(_misfit(process, sampler, "euler or heun"))
    return process


def _flow(process: Process, sampler: str) -> RectifiedFlow:
    if not isinstance(process, RectifiedFlow):
        raise UsageError(_misfit(process, sampler, "ddpm or ddim"))
    return process


def _misfit(process: Process, sampler: str, instead: str) -> str:
    return f"the sampler {sampler!r} does not walk a {kind_of(process)} process: take {instead}."
