"""Pictures of asked-for classes from a trained task."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Key

from effjax.diffusion.caches import BlockwiseCache, StepCache
from effjax.diffusion.caches.blockwise import everything
from effjax.diffusion.guidance import guided
from effjax.diffusion.known import Known
from effjax.diffusion.samplers import Sampler, walk
from effjax.diffusion.samplers.state import State
from effjax.errors import UsageError
from effjax.train.tasks.diffusion import Diffusion


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How pictures are drawn.

    Attributes:
      sampler: how to walk from noise to picture.
      guidance: scale of classifier-free guidance; 1 samples the conditional model at half the cost.
      interval: the share of the process that is guided, from 0, the picture, to 1, noise.
      cache: what is not computed again at every step.
    """

    sampler: Sampler
    guidance: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    cache: StepCache | None = None

    def check(self, task: Diffusion, classes: Sequence[int]) -> None:
        """Refuses what cannot be sampled, before anything is compiled.

        Raises:
          UsageError: for a class that the model does not have, guidance of a model that was never trained
            without labels, an interval that is none, a sampler that does not fit the process, or too many
            steps.
        """
        known = task.model.classes
        for number in classes:
            if not 0 <= number < known:
                raise UsageError(f"class {number} does not exist: the model knows classes 0 to {known - 1}.")
        if self.guidance < 0:
            raise UsageError(
                f"guidance={self.guidance:g} must not be negative: 1 is none, 0 ignores the class."
            )
        if self.guidance != 1.0 and not task.label_dropout:
            raise UsageError(
                f"guidance={self.guidance:g} needs a model trained with dropped labels, and this one was "
                f"trained with label_dropout=0: sample with guidance=1."
            )
        least, greatest = self.interval
        if not 0 <= least < greatest <= 1:
            raise UsageError(
                f"interval={least:g},{greatest:g}: guidance needs two rising shares of the process, between "
                f"0, the picture, and 1, noise."
            )
        self.sampler.plan(task.process)


def sample_classes(
    task: Diffusion,
    variables: Any,
    label: Int[Array, " b"],
    shape: Sequence[int],
    sampling: Sampling,
    keys: Key[Array, " b"],
    known: Known | None = None,
) -> Float[Array, "b *shape"]:
    """Draws one picture for each label; `Sampling.check` says what is refused.

    Args:
      task: holds the model and the process it was trained on.
      variables: the model's, or their moving average.
      label: class of each picture.
      shape: of one picture, `(H, W, C)`, or of one video, `(F, H, W, C)`.
      sampling: sampler and guidance.
      keys: one for each picture; a picture depends on its key alone, not on its batch.
      known: parts that are given and stay as they are; None draws all.
    """
    return walk_classes(task, variables, label, shape, sampling, keys, known=known)[0].x


def calibrated(
    task: Diffusion,
    variables: Any,
    label: Int[Array, " b"],
    shape: Sequence[int],
    sampling: Sampling,
    keys: Key[Array, " b"],
) -> Sampling:
    """The same sampling, with a plan for a cache that needs one: made from these pictures, all computed.

    The outputs of all branches at all steps stand in memory at once, so a few pictures must do.
    """
    cache, sampler = sampling.cache, sampling.sampler
    if not isinstance(cache, BlockwiseCache) or cache.plan is not None:
        return sampling
    whole = everything(sampler.steps * sampler.evaluations, task.stages(variables))
    if sampler.evaluations > 1:
        raise UsageError(
            "bac watches one call a step: take a sampler with one, as ddim, dpm_solver or euler."
        )

    @jax.jit
    def watch(variables: Any, keys: Any) -> Any:
        observed = dataclasses.replace(sampling, cache=whole)
        return walk_classes(task, variables, label, shape, observed, keys, lambda state: state.memory.kept)[1]

    outputs = np.asarray(watch(variables, keys), np.float32)  # [calls, layers, branches, B, N, C]
    return dataclasses.replace(sampling, cache=cache.calibrated(outputs))


def walk_classes(
    task: Diffusion,
    variables: Any,
    label: Int[Array, " b"],
    shape: Sequence[int],
    sampling: Sampling,
    keys: Key[Array, " b"],
    keep: Callable[[State], Any] = lambda state: None,
    known: Known | None = None,
) -> tuple[State, Any]:
    """Like `sample_classes`, but returns where the sampler ended, and what was kept of each step."""
    sampler, cache = sampling.sampler, sampling.cache
    if cache is None:
        denoiser = task.denoiser(variables)
    else:
        denoiser = cache.wrap(task.stages(variables), sampler.steps * sampler.evaluations)
    if sampling.guidance != 1.0:
        least, greatest = (share * task.process.latest for share in sampling.interval)
        interval = None if sampling.interval == (0.0, 1.0) else (least, greatest)
        denoiser = guided(denoiser, sampling.guidance, task.null, interval=interval)
    return walk(sampler, denoiser, task.process, label, shape, keys, keep, known)
