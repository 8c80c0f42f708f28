"""Samplers: from noise to pictures, as one scan over the steps.

A sampler is a frozen dataclass with

    steps                                             how many
    evaluations                                       of the network, a step
    remembered                                        how many earlier estimates a step reads
    plan(process)                                     what each step needs to know, stacked over steps
    step(denoise, process, state, at, keys)           one step

and the scan stands here once.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from effjax.diffusion.denoiser import Condition, Denoiser
from effjax.diffusion.examples import example_noise
from effjax.diffusion.known import Known, given
from effjax.diffusion.process import Process
from effjax.diffusion.samplers.chain import DDIMSampler, DDPMSampler
from effjax.diffusion.samplers.dpm_solver import DPMSolverSampler
from effjax.diffusion.samplers.flow import EulerSampler, HeunSampler
from effjax.diffusion.samplers.state import State, everywhere

Sampler = DDPMSampler | DDIMSampler | DPMSolverSampler | EulerSampler | HeunSampler

KINDS = {
    "ddpm": DDPMSampler,
    "ddim": DDIMSampler,
    "dpm_solver": DPMSolverSampler,
    "euler": EulerSampler,
    "heun": HeunSampler,
}


def walk(
    sampler: Sampler,
    denoiser: Denoiser,
    process: Process,
    condition: Condition,
    shape: Sequence[int],
    keys: Key[Array, " b"],
    keep: Callable[[State], Any] = lambda state: None,
    known: Known | None = None,
) -> tuple[State, Any]:
    """Draws one picture for each condition; returns where the sampler ended, and what was kept of each step.

    Args:
      sampler: how to walk.
      denoiser: what is asked at every step, guided or not, cached or not.
      process: what the denoiser was trained on.
      condition: what each picture should show.
      shape: of one picture.
      keys: one for each picture (`effjax.diffusion.examples.example_keys`): all of its noise.
      keep: what is stacked over steps, of the state behind each.
      known: parts that are given and stay, so that only the others are drawn; None draws all.

    Raises:
      UsageError: where the sampler does not fit the process, or takes more steps than the schedule has.
    """
    plan: dict[str, Array] = {name: _narrow(table) for name, table in sampler.plan(process).items()}
    plan["index"] = jnp.arange(1, sampler.steps + 1)

    if known is not None:
        denoiser = given(denoiser, known)

    def put_back(x: Array) -> Array:
        return x if known is None else known.into(x)

    def denoise(x: Array, t: Array, memory: Any) -> tuple[Array, Any]:
        return denoiser.predict(x, t, condition, memory)

    def step(state: State, at: Any) -> tuple[State, Any]:
        state = sampler.step(denoise, process, state, at, keys)  # type: ignore[arg-type]
        state = dataclasses.replace(state, x=put_back(state.x), x0=put_back(state.x0))
        return state, keep(state)

    # The same start for every sampler and number of steps.
    x = put_back(example_noise(keys, 0, shape))
    earlier = jnp.zeros((sampler.remembered, *x.shape), x.dtype)
    memory = denoiser.start(x, everywhere(plan["t"][0], x), condition)
    return jax.lax.scan(step, State(x, jnp.zeros_like(x), earlier, memory), plan)


def sample(
    sampler: Sampler,
    denoiser: Denoiser,
    process: Process,
    condition: Condition,
    shape: Sequence[int],
    keys: Key[Array, " b"],
) -> Float[Array, "b *shape"]:
    """The pictures alone that `walk` ends at."""
    return walk(sampler, denoiser, process, condition, shape, keys)[0].x


def trajectory(
    sampler: Sampler,
    denoiser: Denoiser,
    process: Process,
    condition: Condition,
    shape: Sequence[int],
    keys: Key[Array, " b"],
) -> Float[Array, "steps b *shape"]:
    """Like `sample`, but returns the estimate of the clean pictures at every step."""
    return walk(sampler, denoiser, process, condition, shape, keys, lambda state: state.x0)[1]


def _narrow(table: np.ndarray) -> Array:
    return jnp.asarray(table, jnp.int32 if table.dtype.kind == "i" else jnp.float32)
