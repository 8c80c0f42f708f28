"""Reflow: pairs of noise and the picture that a flow leads it to, whose paths another flow can straighten.

    x_0 = ODE[v](eps)                    the picture that the noise eps ends at, guided if asked
    S = E int_0^1 |(eps - x_0) - v(x_t, t)|^2 dt / channels     0 where every path is a straight line

A flow that is trained on such pairs (`coupling` of the task `diffusion`) moves the same noise to the same
pictures on straighter paths; where they are straight, one step is as good as many.

Sources: Liu et al., "Flow Straight and Fast", 2023, section 2.2 and eq. 6; Liu et al., "InstaFlow", 2024.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from effjax.diffusion.ddpm import DDPM
from effjax.diffusion.denoiser import Condition, Denoiser, memoryless
from effjax.diffusion.examples import across, example_noise, mean_of_each
from effjax.diffusion.generate import Sampling, sample_classes
from effjax.diffusion.rectified_flow import RectifiedFlow
from effjax.diffusion.samplers import Sampler
from effjax.diffusion.samplers.chain import DDIMSampler, DDPMSampler
from effjax.errors import UsageError
from effjax.train.tasks.diffusion import Diffusion


def pairs(
    task: Diffusion,
    variables: Any,
    condition: Condition,
    shape: Sequence[int],
    sampling: Sampling,
    keys: Key[Array, " b"],
) -> tuple[Float[Array, "b *shape"], Float[Array, "b *shape"]]:
    """Noise, and the picture that the sampler leads it to.

    Raises:
      UsageError: for a sampler that adds noise on its way, whose pictures are no function of the first.
    """
    check_deterministic(sampling.sampler)
    pictures = sample_classes(task, variables, condition, shape, sampling, keys)
    return example_noise(keys, 0, shape), pictures  # where every sampler starts


def check_deterministic(sampler: Sampler) -> None:
    """Refuses samplers that add noise on their way."""
    if isinstance(sampler, DDPMSampler) or (isinstance(sampler, DDIMSampler) and sampler.eta):
        raise UsageError("pairs need a sampler without noise of its own: euler, heun, dpm_solver or ddim.")


def straightness(
    denoiser: Denoiser,
    process: RectifiedFlow,
    noise: Float[Array, "b *shape"],
    picture: Float[Array, "b *shape"],
    condition: Condition,
    times: int = 20,
) -> Float[Array, " b"]:
    """S of each pair, a mean over channels, by the midpoint rule.

    Args:
      denoiser: the flow whose velocities are looked at.
      process: its process.
      noise: where each line begins.
      picture: where it ends.
      condition: what each picture shows.
      times: of the rule.
    """

    def at(t: Array) -> Array:
        t = jnp.broadcast_to(t, noise.shape[:1])
        x_t = process.noise(picture, noise, t)
        velocity, _ = denoiser.predict(x_t, t, condition, denoiser.start(x_t, t, condition))
        return mean_of_each((process.target(picture, noise, t) - velocity) ** 2)  # [B]

    return jnp.mean(jax.lax.map(at, (jnp.arange(times) + 0.5) / times), axis=0)


def as_flow(denoiser: Denoiser, process: DDPM) -> Denoiser:
    """A network of a DDPM as the velocity of a rectified flow, without training.

    A point x_t of a flow has the ratio of picture to noise that the chain has at some time s, of which the
    nearest is taken, and is that point of the chain but for its size:

        (1 - t) / t = sqrt(a_s / (1 - a_s)),     x_s = x_t / sqrt((1 - t)^2 + t^2),     v = eps - x_0

    Beyond the chain's last time, where the ratio is smaller than any it knows, that last time serves. Source:
    InstaFlow, section 3.2, where a flow starts from a network that predicts noise.
    """
    a = jnp.asarray(process.alpha_bar(), jnp.float32)
    noisiness = jnp.sqrt((1 - a) / a)  # rising

    def predict(x_t: Array, t: Array, condition: Condition) -> Array:
        wanted = t / jnp.maximum(1 - t, 1e-6)
        s = jnp.argmin(jnp.abs(jnp.log(noisiness)[None] - jnp.log(wanted + 1e-12)[:, None]), axis=1)
        size = across(jnp.sqrt((1 - t) ** 2 + t**2), x_t)
        x_s = x_t / size
        prediction, _ = denoiser.predict(x_s, s, condition, denoiser.start(x_s, s, condition))
        mean, _ = process.split(prediction, x_t.shape[-1])
        x0, eps = process.to_x0_eps(mean, x_s, s)
        return eps - x0

    return memoryless(predict)
